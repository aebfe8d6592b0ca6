"""The seams with vLLM's front end, and with its web framework."""

import dataclasses
import os
from functools import cache

from workers.plugin.vllm_seams import VLLM
from workers.seams import seams

# Read by a library below vLLM as it is imported, and set as the level of the root logger; by
# default it would be ERROR, which would hide the warnings of all other libraries.
os.environ.setdefault("SAGEMAKER_CONTAINER_LOG_LEVEL", "WARNING")

SEAMS = seams("""
# The asynchronous engine, with the workers in the place of its engine core.
vllm.v1.engine.core_client:EngineCoreClient
    replaced make_async_mp_client(vllm_config, executor_class, log_stats, client_addresses=None,
        client_count=1, client_index=0, renderer=None)
    overridden get_supported_tasks_async(self)
    overridden add_request_async(self, request)
    overridden abort_requests_async(self, request_ids)
    overridden get_output_async(self)
    overridden shutdown(self, timeout=None)
vllm.v1.engine.output_processor:OutputProcessor
    called abort_requests(self, request_ids, internal)
    read request_states
    replaced _update_stats_from_finished(self, req_state, finish_reason, iteration_stats)
vllm.v1.engine.output_processor:RequestState
    read queue request_id external_req_id detokenizer
vllm.v1.engine.detokenizer:IncrementalDetokenizer
    called num_output_tokens(self)
vllm.v1.engine.output_processor:RequestOutputCollector
    called put(self, output)
    read request_id
vllm.v1.engine.async_llm:AsyncLLM
    overridden add_request(self, request_id, prompt, params, arrival_time=None,
        lora_request=None, tokenization_kwargs=None, trace_headers=None, priority=0,
        data_parallel_rank=None, session_id=None, prompt_text=None, reasoning_ended=None,
        reasoning_parser_kwargs=None, kv_hints=None)
    overridden _add_request(self, request, prompt, parent_req, index, queue)
    overridden check_health(self)
    called abort(self, request_id, internal=False)
    read output_processor model_config
    called __init__(self, vllm_config, executor_class, log_stats, usage_context=...,
        mm_registry=..., log_requests=True, start_engine_loop=True, stat_loggers=None,
        aggregate_engine_logging=False, client_addresses=None, client_count=1, client_index=0,
        profiler=None)
    read errored
vllm.v1.engine.async_llm
    named engine_core.engine_ranks_managed
    named engine_core.resources.engine_dead
vllm.v1.engine:FinishReason
    read ERROR
# Hashes of a prompt's blocks, equal to those in the workers' prefix caches.
vllm.utils.hashing
    called get_hash_fn_by_name(hash_fn_name)
vllm.v1.core.kv_cache_utils
    called init_none_hash(hash_fn)
    called hash_block_tokens(hash_function, parent_block_hash, curr_block_token_ids,
        extra_keys=None)
    called generate_block_hash_extra_keys(request, start_token_idx, end_token_idx, start_mm_idx)
vllm.v1.engine:EngineCoreRequest
    read prompt_embeds
vllm.lora.request:LoRARequest
    read lora_name: str
    read lora_path: str
vllm.sampling_params:SamplingParams
    written output_kind
    read n: int
    read max_tokens logprobs prompt_logprobs skip_reading_prefix_cache
vllm.sampling_params:RequestOutputKind
    read DELTA
vllm.v1.metrics.ray_wrappers:RayPrometheusStatLogger
    called __init__(self, vllm_config, engine_indexes=None)
    read counter_num_preempted_reqs
vllm.v1.metrics.ray_wrappers:RayPrometheusMetric
    read metric _tags

# The OpenAI API: its app, arguments and errors.
vllm.entrypoints.launchers.app
    called build_app(args, supported_tasks=None, model_config=None)
prometheus_fastapi_instrumentator.instrumentation
    named PrometheusInstrumentatorMiddleware
vllm.entrypoints.launchers.api_server.app_state
    called init_app_state(engine_client, state, args, supported_tasks=None)
vllm.entrypoints.launchers.cli_args
    called make_arg_parser(parser)
    called validate_parsed_serve_args(args)
    named class BaseFrontendArgs
    named class FrontendArgs
vllm.entrypoints.launchers.cli_args:FrontendArgs
    written chat_template enable_auto_tool_choice enable_prompt_tokens_details tool_call_parser
        enable_tokenizer_info_endpoint tool_strict_level enable_scale_out
vllm.entrypoints.generate.api_router
    named state.openai_serving_chat
    named state.openai_serving_chat_batch
    named state.openai_serving_completion
    named state.openai_serving_responses
    named state.anthropic_serving_messages
    named state.serving_generative_scoring
vllm.entrypoints.scale_out.factories
    named state.serving_tokens
vllm.entrypoints.launchers.api_server.app_state
    named state.openai_serving_models
vllm.entrypoints.openai.models.serving:OpenAIServingModels
    called show_available_models(self)
vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat
    replaced create_chat_completion(self, request, raw_request=None)
    replaced chat_completion_stream_generator
vllm.entrypoints.openai.chat_completion.batch_serving:OpenAIServingChatBatch
    replaced create_batch_chat_completion(self, request, raw_request=None)
vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion
    replaced create_completion(self, request, raw_request=None)
    replaced completion_stream_generator
vllm.entrypoints.openai.responses.serving:OpenAIServingResponses
    replaced create_responses(self, request, raw_request=None)
    replaced responses_stream_generator
vllm.entrypoints.anthropic.serving:AnthropicServingMessages
    replaced create_chat_completion(self, request, raw_request=None)
    replaced chat_completion_stream_generator
    replaced message_stream_converter(self, generator)
vllm.entrypoints.generate.generative_scoring.serving:ServingGenerativeScoring
    replaced create_generative_scoring(self, request, raw_request=None)
vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens
    replaced serve_tokens(self, request, raw_request=None)
    replaced serve_tokens_stream_generator
vllm.entrypoints.serve.engine.protocol:ErrorResponse
    read error
vllm.entrypoints.serve.engine.protocol:ErrorInfo
    read message: str
    read code: int
    read type: str
    read param: str | None
vllm.entrypoints.openai.responses.protocol:ResponsesRequest
    read tools tool_choice include input top_logprobs
vllm.entrypoints.openai.responses.protocol:ResponsesResponse
    read model_copy status
vllm.exceptions:VLLMValidationError
    read parameter value
vllm.entrypoints.serve.exception_handling.error_response
    called create_error_response(message, err_type='BadRequestError', status_code=...,
        param=None)
vllm.entrypoints.serve.exception_handling.handlers.exception
    called exception_handler(req, exc)
vllm.entrypoints.serve.exception_handling.handlers.validation
    called clean_loc_for_param(loc)
vllm.entrypoints.serve.exception_handling.handlers.vllm_error
    named state.server

# Structured output: what is accepted of it.
vllm.v1.structured_output.backend_xgrammar
    replaced validate_xgrammar_grammar(sampling_params)
vllm.entrypoints.serve.engine.protocol
    replaced _REMOVED_GUIDED_FIELDS
    named extra_keys & _REMOVED_GUIDED_FIELDS
vllm.tool_parsers.structural_tag_registry
    replaced resolve_tool_strictness(tools, tool_choice, strict_level)
vllm.v1.structured_output.request
    called get_structured_output_key(params)
vllm.v1.structured_output.utils
    called choice_as_grammar(choice)
vllm.sampling_params
    called check_json_nesting(spec, *, structural_tag=False)
vllm.sampling_params:SamplingParams
    read structured_outputs
vllm.sampling_params:StructuredOutputsParams
    called all_constraints_none(self)
    written choice grammar
    read disable_any_whitespace disable_additional_properties whitespace_pattern json
        structural_tag

starlette._utils
    called get_route_path(scope)
starlette.applications:Starlette
    replaced middleware_stack user_middleware
    read state
starlette.routing:Router
    replaced routes
fastapi.dependencies.utils
    read request_body_to_args(body_fields, received_body, embed_body_fields)
model_hosting_container_standards.logging_config
    named SAGEMAKER_CONTAINER_LOG_LEVEL
""")

FRONT_END = dataclasses.replace(VLLM, seams=SEAMS)


@cache
def check_seams() -> None:
    """Raise SeamBroken if vLLM is not the one that the front end is written for.

    Call it before importing what uses vLLM, so that a module that has moved is named by this error.
    """
    FRONT_END.check()
