"""What cannot be described or pushed is refused."""

from pathlib import Path

import pytest

from peft_sparse.sharing import push_folder, write_card

from conftest import tiny


def saved():
    tiny("llama").save_pretrained("model")
    return "model"


def empty():
    Path("nothing").mkdir(exist_ok=True)
    return "nothing"


REFUSALS = [
    (lambda: write_card(saved(), report=3), TypeError, r"report of this package.*got int.*Give what `prune`"),
    (
        lambda: write_card(saved(), report={"colour": "blue"}),
        ValueError,
        r"Expected a report of `prune`.*fields colour\. Give the report",
    ),
    (
        lambda: push_folder(empty(), "user/name"),
        ValueError,
        r"'nothing' holds neither config\.json nor adapter_config",
    ),
    (
        lambda: push_folder(saved(), "user/name", base_model="/home/me/model"),
        ValueError,
        r"name of a model on the Hub, such as 'user/name', got '/home/me/model'\. Readers",
    ),
]


@pytest.mark.parametrize(("refused", "error", "message"), REFUSALS)
def test_it_is_refused(refused, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        refused()
