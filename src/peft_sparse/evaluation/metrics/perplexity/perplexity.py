"""The perplexity of the pruning papers as a metric of the package `evaluate`."""

import datasets
import evaluate  # type: ignore

from peft_sparse.evaluation.loading import load_model
from peft_sparse.evaluation.protocol import text_perplexity


DESCRIPTION = """\
Perplexity of a causal language model on a text, by the protocol of SparseGPT, Wanda and PERP. The texts are joined by
two newlines and tokenised in one piece. Windows do not overlap, and a last one that is not full is dropped. All tokens
of a window except its first are counted. The result is exp of the mean cross entropy over all counted tokens.
"""

INPUTS = """\
Args:
    predictions: the texts, in the order in which they are joined.
    model: a path, a Hub id, or a model in memory. A path or an id may be that of an adapter of PEFT.
    tokenizer: the tokenizer. By default the one that is saved with the model.
    window: tokens of a window, by default 2048.
    max_windows: measure only so many windows, from the beginning of the text.
    batch_size: how many windows run together, by default 1.
Returns:
    a dict with "perplexity", "tokens", "windows", "window", "text_digest", "token_digest" and "protocol".
"""

CITATION = """\
@article{zimmer2023perp,
  title = {PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs},
  author = {Zimmer, Max and Andoni, Megi and Spiegel, Christoph and Pokutta, Sebastian},
  journal = {arXiv:2312.15230},
  year = {2023},
}
"""


class Perplexity(evaluate.Metric):
    """See `DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, tokenizer=None, window=2048, max_windows=None, batch_size=1):  # type: ignore
        if isinstance(model, str):
            loaded = load_model(model)
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
        if tokenizer is None:
            raise ValueError("A model in memory needs its tokenizer. Give `tokenizer=` to `compute`.")
        measured = text_perplexity(
            model, tokenizer, predictions, window=window, max_windows=max_windows, batch_size=batch_size
        )
        return measured.to_dict()
