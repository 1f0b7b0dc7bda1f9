"""The command line `peft-sparse`: one module for each command, and `main`, which runs them."""
