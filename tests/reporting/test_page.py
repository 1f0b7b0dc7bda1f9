"""The page of a report says what the run has, escapes what comes from outside, and is drawn by a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from peft_sparse import prune
from peft_sparse.pruning.report import PruningReport, WeightReport
from peft_sparse.reconstruction import ReconstructionReport, RegionReport
from peft_sparse.reporting import ModelFacts, RunReport, SavedModel, Stage, report_page

from conftest import tiny


EVIL = "<script>alert(1)</script>"


def pruned(name="model.layers.{}.mlp.up_proj", spread=0.2):
    weights = tuple(
        WeightReport(name.format(i), (8, 8), 0.5 + spread * i / 4, 0.1 + i / 20, 0.2 + i / 20) for i in range(4)
    )
    return PruningReport("wanda", "0.5", "row", 0.5, 1.0, 10**8, weights, left_out={f"{EVIL}.k": "excluded"})


def full():
    regions = tuple(RegionReport(f"model.layers.{i}", 0.2 + i, 0.1 + i, 2, 1.0, False) for i in range(4))
    losses = tuple({"loss": 3.0 - i / 10, "learning_rate": 0.01, "sparsity": 0.5, "step": i} for i in range(9))
    return RunReport(
        "compress",
        recipe="balanced",
        arguments={"criterion": "wanda"},
        seed=3,
        model=ModelFacts("me/model", "LlamaForCausalLM", "float32", 100, 50, 10, "MASK_LORA", "abc"),
        stages=(
            Stage("dense", {"a": 10.0, "b": 5.0}, 0.0, peak_memory_bytes=10**9),
            Stage("pruned", {"a": 900.0, "b": 7.0}, 0.5, 60.0, 90.0, 128, 2 * 10**9),
            Stage("retrained", {"a": 12.0, "b": 6.0}, 0.5, 3700.0, 90.0, 128, 2 * 10**9),
        ),
        peak_memory_bytes=2 * 10**9,
        pruning=pruned(),
        reconstruction=ReconstructionReport("block", "SS", "mse", "full", 3.0, 10**9, pruned(), regions),
        logs={"reconstruction": losses, "training": losses},
        texts={"train": {"sequences": 3, "length": 9, "digest": "d1"}},
        saved=(SavedModel("sparse"), SavedModel("adapter", "adapter", base="pruned")),
    )


def test_the_page_shows_the_stages_and_how_the_result_is_loaded():
    page = report_page(full())
    assert "<title>me/model, compressed by the recipe balanced</title>" in page
    for text in ("10.00 → 12.00", "1 h 1 min", "1.9 GiB", "0.5000", "wanda", "fingerprint abc", "digest d1"):
        assert text in page, text
    codes = [html.unescape(code) for code in re.findall(r"<pre><code>(.*?)</code></pre>", page, flags=re.DOTALL)]
    assert len(codes) == 2
    for code in codes:
        compile(code, "page", "exec")
    assert "PeftModel.from_pretrained(model, 'adapter')" in codes[1]


def test_the_page_needs_no_other_file_and_runs_no_script():
    page = report_page(full())
    assert not re.search(r"<script|<link(?! rel=\"icon\" href=\"data:)|@import|url\(|https?://", page)


def test_what_a_run_has_not_is_absent():
    """Each section is on the page of a full report, and not on that of a report without its data."""
    whole, bare = report_page(full()), report_page(RunReport("train", environment={}, created=""))
    for name in ("done", "stages", "matrices", "regions", "loading", "arguments", "made-by"):
        assert f'id="{name}"' in whole
        assert f'id="{name}"' not in bare
    assert "over time" in whole
    assert "over time" not in bare
    assert "<svg" not in bare
    assert "None" not in whole + bare
    assert "stopped and continued" not in whole


def test_one_sparsity_for_all_matrices_is_a_number_and_no_picture():
    titles = [
        re.findall(r"<figcaption>(.*?)</figcaption>", report_page(RunReport("prune", pruning=pruned(spread=spread))))
        for spread in (0.0, 0.2)
    ]
    errors = ["output error before refinement and update", "output error"]
    assert titles == [errors, ["sparsity", *errors]]


def test_every_string_of_a_run_is_escaped():
    """Also where it stands in an attribute or in the text that a pointer shows."""

    def evil(value, key=""):
        if isinstance(value, dict):
            named = key in ("perplexity", "logs", "texts", "arguments", "left_out", "sha256", "versions")
            return {(f"{EVIL}\"'{k}" if named else k): evil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [evil(each, key) for each in value]
        return f"{EVIL}\"'{value}" if isinstance(value, str) and key not in ("kind", "group") else value

    from peft_sparse.reporting.reading import _made, _with_pruning

    plain = evil(full().to_dict())
    plain.pop("schema")
    page = report_page(_with_pruning(_made(RunReport, plain, "report")))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 40
    # Attributes of pictures, which hold the names of matrices and stages, are closed by the page alone.
    assert all("alert" not in tag or "&lt;" in tag for tag in re.findall(r"<svg[^>]*>", page))


def test_heat_maps_have_one_cell_for_each_matrix_and_the_numbers_beside_it():
    report = prune(tiny("llama"), 0.5, torch.randint(0, 61, (6, 12)), criterion="wanda")
    page = report_page(RunReport("prune", pruning=report))
    cells = re.findall(r'<rect [^>]*class="q\d"><title>(.*?)</title>', page)
    assert len(cells) == len(report.weights) == 21
    assert cells[0].startswith("self_attn.q_proj, block 0: ")
    assert page.count('<tr><th scope="row">') == 3 + 0


# Runs in the page, and writes what it finds into the title, which `--dump-dom` prints.
PROBE = """
<script>
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
window.addEventListener("load", () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const svgs = [...page.querySelectorAll("figure > svg, .scroll > svg")];
  const drawn = svgs.map(svg => {
    const box = svg.getBoundingClientRect(), inside = svg.getBBox();
    const whole = svg.viewBox.baseVal;
    const fits = inside.x > -1 && inside.y > -1 && inside.x + inside.width < whole.width + 1
      && inside.y + inside.height < whole.height + 1;
    return box.width > 100 && box.height > 20 && inside.width > 50 && fits ? "drawn"
      : [box.width, box.height, inside.x, inside.y, inside.width, inside.height, whole.width, whole.height].join(" ");
  });
  const body = page.scrollingElement;
  const colour = frame.contentWindow.getComputedStyle(page.documentElement).backgroundColor;
  const found = {errors, drawn, overflow: body.scrollWidth - body.clientWidth, colour};
  document.body.setAttribute("data-found", JSON.stringify(found));
});
</script>
"""


def browser():
    name = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if name is None:
        pytest.skip("Chromium is not installed")
    return name


@pytest.mark.parametrize(("width", "scheme"), [(375, 0), (1280, 1)])
def test_a_browser_draws_every_picture_and_nothing_is_wider_than_the_screen(width, scheme, tmp_path):
    report = full()
    page = report_page(report)
    frame = f'<iframe width="{width}" height="800" srcdoc="{html.escape(page)}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frame}{PROBE}")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", "--enable-logging=stderr", "--window-size=1400,900"]
    run = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(html.unescape(re.search(r'data-found="(.*?)"', run.stdout)[1]))
    assert found["errors"] == []
    assert "CONSOLE" not in run.stderr
    assert len(found["drawn"]) == page.count("<figure>") >= 10
    assert set(found["drawn"]) == {"drawn"}
    assert found["overflow"] <= 0
    assert found["colour"] == ("rgb(17, 22, 29)" if scheme == 0 else "rgb(255, 255, 255)")
