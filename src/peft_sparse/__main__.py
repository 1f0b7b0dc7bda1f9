"""`python -m peft_sparse` is the command line `peft-sparse`, for `accelerate launch -m peft_sparse` too."""

from .commands.main import start


if __name__ == "__main__":
    start()
