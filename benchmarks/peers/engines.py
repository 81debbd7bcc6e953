"""The engines, and the job that each of them does.

This file is imported by interpreters without rocketkv, rich or torch: what an engine needs, its `load` imports.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Token = int | str  # a token's id, or its text from an engine that does not tell ids
OnToken = Callable[[Token], None]  # a function that takes each token as soon as it is known
Decode = Callable[[OnToken], None]  # a function that reads the prompt and decodes `Job.new_tokens` tokens


class SkippedError(Exception):
    """An engine cannot run here; the message says why."""


@dataclass(frozen=True)
class Job:
    """The job of every engine.

    Attributes:
        prompt: the prompt's token ids.
        new_tokens: the number of tokens to decode, also past the end of the answer, >= 3.
        threads: the number of CPU threads.
        token_budget: the tokens that the compressing engines may attend to, a multiple of 32.
        gguf: the path of the model's GGUF file.
        openvino_model: the folder that optimum-cli wrote; None if there is none.
        patience_s: the most seconds to wait, between prefill and decoding, for other processes to become quiet.
    """

    prompt: list[int]
    new_tokens: int
    threads: int
    token_budget: int
    gguf: str
    openvino_model: str | None
    patience_s: float


@dataclass(frozen=True)
class Engine:
    """A line of the table.

    Attributes:
        family: the family whose interpreter runs the engine (`--python FAMILY=PATH`).
        package: the package whose version is reported.
        formats: the formats of weights and cache, as text; `{openvino}` becomes the name of OpenVINO's folder.
        load: a function that loads the model, untimed, and returns the function that is timed.
    """

    family: str
    package: str
    formats: str
    load: Callable[[Job], Decode]


def llama_cpp(cache_type: str) -> Callable[[Job], Decode]:
    """Return a loader of llama.cpp with flash attention; `cache_type` is f16, its default, or q8_0."""

    def load(job: Job) -> Decode:
        import xllamacpp as lib

        params = lib.CommonParams()
        params.model.path = job.gguf
        params.n_ctx = len(job.prompt) + job.new_tokens
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
        params.flash_attn_type = lib.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.cache_type_k = params.cache_type_v = getattr(lib.ggml_type, f"GGML_TYPE_{cache_type.upper()}")
        server = lib.Server(params)  # it runs in this process, in threads of its own
        request = {
            "prompt": job.prompt,
            "n_predict": job.new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }

        def decode(on_token: OnToken) -> None:
            def on_piece(piece: dict[str, Any]) -> None:
                choice = piece["choices"][0]
                if choice["finish_reason"] is None:
                    on_token(choice["text"])

            server.handle_completions(request, on_piece)

        return decode

    return load


def openvino(evict: bool) -> Callable[[Job], Decode]:
    """Return a loader of OpenVINO GenAI's continuous batching, with cache eviction or without."""

    def load(job: Job) -> Decode:
        import numpy
        import openvino as ov
        import openvino_genai as genai

        if job.openvino_model is None:
            raise SkippedError("give the folder of the exported model with --openvino-model")
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1  # GiB, more than the prompt needs
        scheduler.max_num_batched_tokens = len(job.prompt)  # this takes the prompt in one piece
        if evict:
            scheduler.use_cache_eviction = True
            scheduler.cache_eviction_config = genai.CacheEvictionConfig(
                start_size=32,
                recent_size=128,
                max_cache_size=job.token_budget,
                aggregation_mode=genai.AggregationMode.NORM_SUM,
            )
        options = {"INFERENCE_NUM_THREADS": job.threads}
        pipeline = genai.ContinuousBatchingPipeline(job.openvino_model, scheduler, "CPU", options)
        generation = genai.GenerationConfig(max_new_tokens=job.new_tokens, do_sample=False, ignore_eos=True)

        def decode(on_token: OnToken) -> None:
            request = pipeline.add_request(0, ov.Tensor(numpy.array([job.prompt])), generation)
            while pipeline.has_non_finished_requests():
                pipeline.step()
                while request.can_read():
                    for output in request.read().values():
                        for token in output.generated_ids:
                            on_token(token)

        return decode

    return load


def transformers(
    dtype: str, compressed: bool, *, fast: bool = False, weight_dtype: str | None = None
) -> Callable[[Job], Decode]:
    """Return a loader of `generate` with a DynamicCache or rocketkv's; `fast` compiles the decode step."""

    def load(job: Job) -> Decode:
        import torch
        from transformers import DynamicCache
        from transformers.generation.streamers import BaseStreamer

        import rocketkv
        from rocketkv import RocketKVCache, RocketKVConfig, enable
        from rocketkv.hf.models import load as load_model
        from rocketkv.hf.versions import pass_cache

        class Streamer(BaseStreamer):
            def __init__(self, on_token: OnToken) -> None:
                self.on_token = on_token
                self.is_prompt = True

            def put(self, value: torch.Tensor) -> None:
                if not self.is_prompt:
                    self.on_token(int(value))
                self.is_prompt = False

            def end(self) -> None:
                pass

        torch.set_num_threads(job.threads)
        model = load_model(job.gguf, dtype, weight_dtype).model
        pad = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = None  # this decodes past the end of the answer
        prompt = torch.tensor([job.prompt])

        def generate(prompt: torch.Tensor, new_tokens: int, on_token: OnToken) -> None:
            cache: DynamicCache = DynamicCache(config=model.config)
            if compressed:
                cache = RocketKVCache(enable(model).config, RocketKVConfig(token_budget=job.token_budget))
            with torch.inference_mode():
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    **pass_cache(cache),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=pad,
                    streamer=Streamer(on_token),
                )

        if fast:
            rocketkv.compile(model)
            generate(prompt[:, :8], 4, lambda token: None)  # this compiles, which counts as loading, as elsewhere
        return lambda on_token: generate(prompt, job.new_tokens, on_token)

    return load


ENGINES = {
    "llama.cpp": Engine("llama.cpp", "xllamacpp", "Q4_1 / f16", llama_cpp("f16")),
    "llama.cpp q8": Engine("llama.cpp", "xllamacpp", "Q4_1 / q8_0", llama_cpp("q8_0")),
    "openvino": Engine("openvino", "openvino-genai", "{openvino} / u8", openvino(evict=False)),
    "openvino evict": Engine("openvino", "openvino-genai", "{openvino} / u8", openvino(evict=True)),
    "transformers fp32": Engine("transformers", "transformers", "fp32 / fp32", transformers("float32", False)),
    "transformers bf16": Engine("transformers", "transformers", "bf16 / bf16", transformers("bfloat16", False)),
    "rocketkv fp32": Engine("rocketkv", "rocketkv", "fp32 / fp32", transformers("float32", True)),
    "rocketkv bf16": Engine("rocketkv", "rocketkv", "bf16 / bf16", transformers("bfloat16", True)),
    "rocketkv fast": Engine("rocketkv", "rocketkv", "bf16 / bf16", transformers("bfloat16", True, fast=True)),
    "rocketkv fast int4": Engine(
        "rocketkv", "rocketkv", "int4 / bf16", transformers("bfloat16", True, fast=True, weight_dtype="int4")
    ),
}
