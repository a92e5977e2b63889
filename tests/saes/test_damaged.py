"""SAE folders of every layout whose files are damaged: one error that names the file, or an SAE that is sound."""

import shutil
import time

import pytest
import torch
from hostile import chances, damage, outcome
from test_formats import CASES

from stethoscope.errors import SAEError
from stethoscope.saes.open import load_sae, read_folder

LAYOUTS = [
    "sae_lens, topk", "sae_lens, gated", "sae_lens, flat jumprelu", "sae_lens, batchtopk as its trainer saves it", "sparsify, topk of an MLP",
    "gemma scope 2, resid_post_all", "gemma scope 1, res", "dictionary_learning, AutoEncoderTopK",
    "dictionary_learning, JumpReluAutoEncoder", "llama scope, jumprelu", "qwen scope, topk",
]

@pytest.mark.parametrize("name", LAYOUTS)
def test_fuzz(name, tmp_path):
    torch.manual_seed(0)
    path = CASES[name](tmp_path / "sound").path
    from collections import Counter
    import traceback
    seen = Counter()
    start = time.time()
    for number, chance in enumerate(chances(name, 40)):
        root = shutil.copytree(tmp_path / "sound", tmp_path / str(number))
        own = root / path.relative_to(tmp_path / "sound")
        files = sorted(f for f in root.rglob("*") if f.is_file()) 
        file = chance.choice(files)
        damage(file, chance)
        def read():
            sae = load_sae(read_folder(own))
            assert sae.encode(torch.zeros(2, sae.cfg.d_in)).isfinite().all()
        try:
            said = outcome(read)
            seen["ok" if said == "passed" else "message"] += 1
            if said != "passed" and "-v" : print(name, file.name, said[:300].replace("\n", " | "))
        except Exception as e:
            tb = traceback.extract_tb(e.__traceback__)
            seen["TRACE"] += 1
            print("TRACE", name, number, file.name, type(e).__name__, str(e)[:150], [f"{f.filename.split('/')[-1]}:{f.lineno}" for f in tb][-4:])
    print(seen, time.time() - start)
