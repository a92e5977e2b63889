"""What the features of a diagnosis fire on, as saved by `gather_evidence`."""

from typing import Any, ClassVar

from stethoscope.artifacts import Artifact, Frozen


class Context(Frozen):
    """A token on which a feature fires, in its text.

    Attributes:
        document: its number in the corpus, from 0.
        before: about a dozen tokens of text; ``after`` too.
    """

    document: int
    before: str
    token: str
    after: str
    activation: float


class FeatureEvidence(Frozen):
    """What one feature fires on and what it promotes.

    Attributes:
        contexts: by corpus, the strongest first, one per document at most and each of other words; empty where it
            never fires in the sample.
        promotes: tokens whose logits its direction raises most; None if its site has no way to the logits of its own.
        link: a public page about it, where the SAE names one.
        passed: share of the change along it that the filter lets through, see `passed_shares`; where that is asked.
    """

    feature: int
    contexts: dict[str, tuple[Context, ...]]
    promotes: tuple[str, ...] | None
    link: str | None
    passed: float | None = None

    @property
    def strongest(self) -> tuple[str, Context] | None:
        """Of all contexts the one with the largest activation, after the name of its corpus."""
        found = [(name, context) for name, some in self.contexts.items() for context in some]
        return max(found, key=lambda pair: pair[1].activation, default=None)


class LayerEvidence(Frozen):
    """A layer's most specific features, in the diagnosis' order, or those that the filter passes most to mutes most."""

    layer: int
    features: tuple[FeatureEvidence, ...]


class Evidence(Artifact):
    """The strongest contexts of some features of each layer.

    Attributes:
        documents: how many of each corpus were searched, from the top.
    """

    FILE: ClassVar[str] = "evidence.json"

    documents: dict[str, int]
    layers: tuple[LayerEvidence, ...]

    def to_frame(self) -> Any:
        """A data frame with a row per feature, with its strongest context and that one's corpus."""
        import pandas as pd

        rows = [(part.layer, one, *(one.strongest or (None, None))) for part in self.layers for one in part.features]
        return pd.DataFrame(
            {"layer": layer, **one.model_dump(exclude={"contexts"}), "corpus": corpus, **dict(context or {})}
            for layer, one, corpus, context in rows
        )
