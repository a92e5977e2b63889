"""EleutherAI's sparsify; the folder is called like the module that it reads."""

from typing import Any

from stethoscope.saes.layouts.base import Converted, SAEFolder, State, Stored, read_config, renamed, sae_lens_config

TENSORS = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def read(stored: Stored) -> SAEFolder:
    config = stored.config
    if (activation := config.get("activation", "topk")) != "topk":
        stored.problems.append(f"the activation function `{activation}` is not supported; this is: topk")
    unsupported = [name for name in ("signed", "embed_skip", "gram_lookup") if config.get(name)]
    stored.problems.extend(f"`{name}` is not supported" for name in unsupported)
    if not isinstance(k := config.get("k"), int) or k < 1:
        stored.problems.append(f"`k` is `{k}`, not a positive whole number")
    module, transcode = stored.path.name, bool(config.get("transcode"))
    run = stored.path.parent / "config.json"
    model_name = read_config(run).get("model") if run.is_file() else None
    hook_name, architecture = (f"{module}.input", "topk_transcoder") if transcode else (module, "topk")
    sizes = config.get("d_in"), stored.matrix("encoder.weight")[0]
    return stored.folder(hook_name, architecture, sizes, TENSORS, model_name=model_name)


def convert(folder: SAEFolder, config: dict[str, Any], tensors: State) -> Converted:
    """The k largest of relu((x - b_dec) W_enc + b_enc); a transcoder subtracts no bias."""
    options = sae_lens_config(folder, "topk", b_dec_to_input=not folder.transcoder, k=config["k"])
    return options, renamed(tensors, TENSORS)
