"""Makes the drafters that a config names."""

from collections.abc import Callable
from pathlib import Path

from workers.config import DraftConfig, EngineConfig, WorkerConfig
from workers.drafters.drafter import Drafter
from workers.drafters.suffix_drafter import SuffixDrafter


def make_drafters(
    config: DraftConfig, target: str, resolve: Callable[[str], str]
) -> dict[str, Drafter]:
    """Drafters by name, for the target model at the path `target`.

    `resolve` returns the path or hub id of a model by its name.
    """
    drafters: dict[str, Drafter] = {}
    for name in config.drafters:
        if name == "suffix":
            drafters[name] = SuffixDrafter(config.memory_tokens)
        elif name == "head":
            # It needs the compiled kernels, which a draft worker without a head does not.
            from workers.drafters.draft_head import DEFAULT_HEAD, DraftHead
            from workers.drafters.head_drafter import HeadDrafter

            head = Path(config.head) if config.head else DEFAULT_HEAD
            drafters[name] = HeadDrafter(DraftHead(head, Path(target)))
        else:
            # Importing vLLM takes about ten seconds.
            from workers.drafters.vllm_model_drafter import ModelDrafter

            assert config.model  # checked by DraftConfig
            worker = WorkerConfig(
                cpus=max(config.cpus, 1),
                weight_format=config.model_weight_format,
                engine=EngineConfig(kv_cache_gib=config.model_kv_cache_gib),
            )
            drafters[name] = ModelDrafter(
                resolve(config.model), worker, target, config.num_speculative_tokens
            )
    return drafters
