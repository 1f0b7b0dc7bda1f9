"""The model and the text of the demonstration, for examples and benchmarks. The package has them for `peft-sparse`."""

from peft_sparse.commands.demonstration import digest, python_documents, smollm2_dir


__all__ = ["digest", "python_documents", "smollm2_dir"]
