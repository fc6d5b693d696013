"""MLflow's `python_function` of encoder-decoders, for which transformers 5 has no pipeline.

MLflow imports this module in whatever process loads such a model, since MLmodel names it.
"""

from collections.abc import Mapping
from typing import Any

LENGTH = 256  # new tokens where the model states none, as in transformers' pipelines


class Seq2Seq:
    """Texts in, texts out."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """What the decoder generates for each text.

        Args:
            model_input: a data frame whose first column holds the texts, as MLflow makes of a list.
            params: of `generate`.
        """
        texts = list(model_input.iloc[:, 0])
        tokens = self.tokenizer(texts, return_tensors="pt", padding=True)
        read = {
            name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }
        stated = self.model.generation_config
        limit = {} if stated.max_length or stated.max_new_tokens else {"max_new_tokens": LENGTH}
        made = self.model.generate(**read, **limit | dict(params or {}))
        return list(self.tokenizer.batch_decode(made, skip_special_tokens=True))


def _load_pyfunc(path: str) -> Seq2Seq:
    """The model at `path`; the name is MLflow's."""
    import mlflow.transformers  # noqa: PLC0415

    parts = mlflow.transformers.load_model(path, return_type="components")
    return Seq2Seq(parts["model"], parts["tokenizer"])
