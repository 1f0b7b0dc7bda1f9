"""`peft-sparse push` passes everything on to `push_folder`."""

import argparse
from unittest import mock

from peft_sparse.commands import push


def parsed(*words):
    parser = argparse.ArgumentParser()
    push.add_arguments(parser)
    return parser.parse_args(words)


def test_the_example_is_one_of_its_command_lines():
    name, command, *words = push.EXAMPLE.split()
    assert (name, command) == ("peft-sparse", "push")
    assert parsed(*words).repo_id == "user/smollm2-half"


def test_every_argument_is_passed_on():
    with mock.patch("peft_sparse.commands.push.push_folder", return_value="address") as pushed:
        assert push.run(parsed("folder", "user/name")) == ["address"]
        words = "folder user/name --report a.json --report b.json --base_model user/base --private --revision r"
        push.run(parsed(*words.split(), "--create_pr", "--commit_message", "Mine"))
    plain, full = (call.kwargs for call in pushed.call_args_list)
    assert plain == {
        "report": None,
        "base_model": None,
        "private": None,
        "revision": None,
        "create_pr": False,
        "commit_message": None,
    }
    assert full == {
        "report": ["a.json", "b.json"],
        "base_model": "user/base",
        "private": True,
        "revision": "r",
        "create_pr": True,
        "commit_message": "Mine",
    }
    assert pushed.call_args.args == ("folder", "user/name")
