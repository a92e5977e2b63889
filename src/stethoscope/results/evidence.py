"""What the features of a diagnosis fire on, as saved by `gather_evidence`."""

from typing import ClassVar

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
    """

    feature: int
    contexts: dict[str, tuple[Context, ...]]
    promotes: tuple[str, ...] | None
    link: str | None


class LayerEvidence(Frozen):
    """A layer's most specific features, in the diagnosis' order."""

    layer: int
    features: tuple[FeatureEvidence, ...]


class Evidence(Artifact):
    """The strongest contexts of each layer's most specific features.

    Attributes:
        documents: how many of each corpus were searched, from the top.
    """

    FILE: ClassVar[str] = "evidence.json"

    documents: dict[str, int]
    layers: tuple[LayerEvidence, ...]
