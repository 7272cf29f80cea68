"""Options of vLLM's that are none of manta's, so that whoever knows ``vllm serve`` can go on.

One table says of each: another name for an option of manta's, or the values at which it asks for
nothing, which are vLLM's defaults and what manta does anyway, and what there is instead of the
others. ``translated`` reads it for the command line, ``LLM``, files and the server alike.

Source: the arguments of vLLM's EngineArgs, AsyncEngineArgs and FrontendArgs, with those that it has
dropped since 0.5. One that is newer than this table is an unknown option.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine.errors import ConfigError
from engine.values import asks_for_nothing

ALIASES = {  # vLLM's name: manta's
    "api_server_count": "num_ingress_replicas",
    "data_parallel_size": "num_replicas",
    "kv_offloading_size": "swap_space",
    "otlp_traces_endpoint": "otlp_endpoint",
    "renderer_num_workers": "num_ingress_replicas",
}
SHORT = {  # vLLM's short flags
    "tensor_parallel_size": "-tp",
    "pipeline_parallel_size": "-pp",
    "data_parallel_size": "-dp",
    "api_server_count": "-asc",
    "quantization": "-q",
    "optimization_level": "-O",
    "compilation_config": "-cc",
    "attention_config": "-ac",
    "speculative_config": "-sc",
    "decode_context_parallel_size": "-dcp",
    "prefill_context_parallel_size": "-pcp",
    "enable_expert_parallel": "-ep",
    "nnodes": "-n",
    "node_rank": "-r",
}
ANY = ...  # among neutral values: every value asks for nothing here
_ON_OR_OFF = (False, True)  # of a flag for what is so anyway, or makes no difference here


@dataclass(frozen=True)
class Foreign:
    """An option of vLLM's: when it asks for nothing, and what there is ``instead``."""

    neutral: tuple[Any, ...]
    instead: str

    @property
    def flag(self) -> bool:
        """Whether it is on or off, without a value on the command line."""
        return bool(self.neutral) and all(isinstance(value, bool) for value in self.neutral)


# What there is instead, of which options, with their neutral values (None and what is empty, as ""
# or {}, always are).
_TABLE: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "manta runs no code of checkpoints, and needs none for the models that it knows": {
        "trust_remote_code": _ON_OR_OFF, "code_revision": (), "model_impl": ("auto", "vllm"),
    },
    "/metrics counts requests, and --access-log logs them without their text": {
        "disable_log_requests": _ON_OR_OFF, "enable_log_requests": (False,),
        "enable_log_outputs": (False,), "enable_log_deltas": _ON_OR_OFF, "max_log_len": (ANY,),
        "disable_uvicorn_access_log": _ON_OR_OFF, "disable_access_log_for_endpoints": (ANY,),
        "uvicorn_log_level": ("info", "warning", "error", "critical"), "log_config_file": (),
        "log_error_stack": (False,),
    },
    "/metrics and /load tell all that is counted": {
        "disable_log_stats": _ON_OR_OFF, "aggregate_engine_logging": (False,),
        "enable_server_load_tracking": _ON_OR_OFF, "show_hidden_metrics_for_version": (),
        "otlp_traces_endpoint": (), "collect_detailed_traces": (), "kv_cache_metrics": (False,),
        "kv_cache_metrics_sample": (0.01,), "cudagraph_metrics": (False,),
        "enable_layerwise_nvtx_tracing": (False,), "enable_mfu_metrics": (False,),
        "enable_logging_iteration_details": (False,), "enable_mm_processor_stats": (False,),
        "enable_per_request_metrics": (False,), "profiler_config": (),
    },
    "the usage always tells the cached tokens, and a stream's with stream_options": {
        "enable_prompt_tokens_details": _ON_OR_OFF, "enable_force_include_usage": (False,),
    },
    "answers always have x-request-id": {"enable_request_id_headers": _ON_OR_OFF},
    "a request may ask for it": {
        "return_tokens_as_token_ids": (False,), "default_chat_template_kwargs": (),
        "response_role": ("assistant",), "enable_tokenizer_info_endpoint": (False,),
        "tokens_only": (False,),
    },
    "sampling parameters come from requests and generation_config.json": {
        "override_generation_config": (), "logits_processors": (), "logits_processor_pattern": (),
        "logprobs_mode": ("raw_logprobs",),
    },
    "a proxy in front can do it": {
        "uds": (), "middleware": (), "ssl_ca_certs": (), "ssl_cert_reqs": (0,), "ssl_ciphers": (),
        "enable_ssl_refresh": (False,), "allow_credentials": (False,),
        "allowed_methods": (["*"],), "allowed_headers": (["*"],), "disable_fastapi_docs": (False,),
        "enable_offline_docs": (False,), "h11_max_incomplete_event_size": (4 << 20,),
        "h11_max_header_count": (256,), "grpc": (False,),
    },
    "the system_fingerprint is a hash of what is served": {
        "fingerprint_mode": ("full", "hash"), "fingerprint_value": (),
    },
    "output is text: nothing of it is parsed": {
        "enable_auto_tool_choice": _ON_OR_OFF, "tool_parser_plugin": (),
        "tool_server": (), "exclude_tools_when_tool_choice_none": _ON_OR_OFF,
        "enable_reasoning": _ON_OR_OFF, "reasoning_parser_plugin": (),
        "reasoning_config": (), "cohere_format": ("cmd4",),
        "cohere_is_reasoning_model": _ON_OR_OFF,
    },
    "llguidance constrains structured output, and each request says how": {
        "structured_outputs_config": (), "guided_decoding_backend": ("auto", "guidance"),
        "guided_decoding_disable_fallback": _ON_OR_OFF,
        "guided_decoding_disable_any_whitespace": (False,),
        "guided_decoding_disable_additional_properties": (False,),
    },
    "the option pooling says whether and how prompts become vectors": {
        "runner": ("auto", "generate"), "task": ("auto", "generate"), "convert": ("auto", "none"),
        "pooler_config": (), "override_pooler_config": (),
    },
    "manta serves models of text": {
        "enable_prompt_embeds": (False,),
        "io_processor_plugin": (), "enable_flash_late_interaction": _ON_OR_OFF,
        "language_model_only": _ON_OR_OFF, "limit_mm_per_prompt": (),
        "enable_mm_embeds": (False,), "interleave_mm_strings": (False,), "media_io_kwargs": (),
        "mm_processor_kwargs": (), "mm_processor_cache_gb": (4, 0),
        "mm_processor_cache_type": ("lru",), "mm_shm_cache_max_object_size_mb": (128,),
        "mm_encoder_only": (False,), "mm_encoder_tp_mode": ("weights",),
        "mm_encoder_attn_backend": (), "mm_encoder_attn_dtype": (), "mm_tensor_ipc": (),
        "skip_mm_profiling": _ON_OR_OFF, "video_pruning_rate": (0,),
        "disable_mm_preprocessor_cache": _ON_OR_OFF, "allowed_local_media_path": (),
        "allowed_media_domains": (), "disable_chunked_mm_input": _ON_OR_OFF,
        "enable_multimodal_encoder_data_parallel": (False,), "ec_transfer_config": (),
    },
    "there are no LoRA adapters": {
        "enable_lora": (False,), "lora_modules": (), "max_loras": (1,), "max_lora_rank": (16,),
        "max_cpu_loras": (), "lora_dtype": ("auto",), "lora_extra_vocab_size": (256,),
        "lora_target_modules": (), "default_mm_loras": (), "fully_sharded_loras": (False,),
        "enable_lora_bias": (False,), "enable_tower_connector_lora": (False,),
        "specialize_active_lora": (False,), "enable_prompt_adapter": (False,),
        "max_prompt_adapters": (1,), "max_prompt_adapter_token": (0,),
    },
    "there is no speculative decoding": {
        "speculative_config": (), "speculative_model": (), "num_speculative_tokens": (),
        "num_lookahead_slots": (0,), "ngram_prompt_lookup_max": (), "ngram_prompt_lookup_min": (),
        "speculative_draft_tensor_parallel_size": (),
    },
    "the checkpoint's quantization_config says it, or the option quantization": {
        "quantization_config": (), "allow_deprecated_quantization": (False,),
    },
    "all KV blocks are of kv_cache_dtype, where 8-bit floats have scales of their own": {
        "kv_cache_dtype_skip_layers": (),
        "calculate_kv_scales": _ON_OR_OFF, "override_attention_dtype": (),
        "quantization_param_path": (),
    },
    "HF_TOKEN and HF_HUB_CACHE in the environment say it": {
        "hf_token": _ON_OR_OFF, "download_dir": (),
    },
    "the tokenizer is the one that transformers finds at tokenizer and revision": {
        "tokenizer_mode": ("auto", "hf", "fast"), "tokenizer_revision": (),
        "skip_tokenizer_init": (False,), "tokenizer_pool_size": (0,),
        "tokenizer_pool_type": ("ray",), "tokenizer_pool_extra_config": (),
    },
    "the checkpoint's config.json says it": {
        "config_format": ("auto", "hf"), "hf_config_path": (), "hf_overrides": (),
        "rope_scaling": (), "rope_theta": (), "disable_sliding_window": (False,),
    },
    "load_format says how weights are read": {
        "model_loader_extra_config": (), "ignore_patterns": (), "pt_load_map_location": ("cpu",),
        "safetensors_load_strategy": ("lazy", "eager"), "max_parallel_loading_workers": (),
        "model_weights": (),
    },
    "weights stay where they are computed with": {
        "cpu_offload_gb": (0,), "cpu_offload_params": (), "offload_backend": ("auto",),
        "offload_group_size": (0,), "offload_num_in_group": (1,), "offload_prefetch_step": (1,),
        "offload_params": (), "enable_sleep_mode": (False,), "weight_transfer_config": (),
    },
    "cold prefixes go to CPU memory (swap_space), and nowhere else": {
        "kv_offloading_backend": ("native",), "kv_transfer_config": (), "kv_events_config": (),
        "kv_sharing_fast_prefill": (False,),
    },
    "nothing is captured or compiled that could be chosen but by max_cudagraph_capture_size": {
        "compilation_config": (), "optimization_level": (), "cudagraph_capture_sizes": (),
        "cuda_graph_sizes": (), "max_seq_len_to_capture": (ANY,),
        "max_context_len_to_capture": (ANY,), "performance_mode": ("balanced",),
        "attention_config": (), "kernel_config": (), "ir_op_priority": (),
        "enable_flashinfer_autotune": _ON_OR_OFF, "disable_cascade_attn": _ON_OR_OFF,
        "disable_custom_all_reduce": (False,), "additional_config": (),
    },
    "the scheduler has max_num_seqs, max_num_batched_tokens and scheduling_policy": {
        "max_num_partial_prefills": (1,), "max_long_partial_prefills": (1,),
        "long_prefill_token_threshold": (0,), "scheduler_delay_factor": (0,),
        "num_scheduler_steps": (1,), "multi_step_stream_outputs": _ON_OR_OFF, "scheduler_cls": (),
        "scheduler_reserve_full_isl": _ON_OR_OFF, "stream_interval": (1,),
        "async_scheduling": _ON_OR_OFF, "disable_async_output_proc": _ON_OR_OFF,
        "disable_hybrid_kv_cache_manager": _ON_OR_OFF, "use_v2_block_manager": _ON_OR_OFF,
        "prefix_caching_hash_algo": ("sha256", "builtin"),
    },
    "Ray places the workers, on the cluster that RAY_ADDRESS names": {
        "nnodes": (1,), "node_rank": (0,), "master_addr": ("127.0.0.1",), "master_port": (29501,),
        "headless": (False,), "worker_cls": ("auto",), "worker_extension_cls": (),
        "ray_workers_use_nsight": (False,), "worker_use_ray": _ON_OR_OFF,
        "engine_use_ray": _ON_OR_OFF, "disable_frontend_multiprocessing": _ON_OR_OFF,
        "numa_bind": (False,), "numa_bind_nodes": (), "numa_bind_cpus": (),
        "distributed_timeout_seconds": (), "fail_on_environ_validation": _ON_OR_OFF,
    },
    "tensor_parallel_size, pipeline_parallel_size and a server's num_replicas say it": {
        "data_parallel_size": (1,), "data_parallel_size_local": (), "data_parallel_rank": (),
        "data_parallel_start_rank": (), "data_parallel_address": (), "data_parallel_rpc_port": (),
        "data_parallel_backend": ("mp", "ray"), "data_parallel_hybrid_lb": (False,),
        "data_parallel_external_lb": (False,), "data_parallel_multi_port_external_lb": (False,),
        "decode_context_parallel_size": (1,), "prefill_context_parallel_size": (1,),
        "dcp_comm_backend": (), "dcp_kv_cache_interleave_size": (1,),
        "cp_kv_cache_interleave_size": (1,), "disable_nccl_for_dp_synchronization": _ON_OR_OFF,
    },
    "a server has num_ingress_replicas": {"api_server_count": (1,), "renderer_num_workers": (1,)},
    "states of recurrent layers are float32, and kept by manta's own policy (mamba_block_size)": {
        "mamba_cache_dtype": ("auto", "float32"), "mamba_ssm_cache_dtype": ("auto", "float32"),
        "mamba_cache_mode": ("none", "align", "all"), "mamba_backend": (),
        "gdn_prefill_backend": (),
    },
    "enable_expert_parallel says how the ranks of a layer share its experts": {
        "enable_ep_weight_filter": _ON_OR_OFF, "enable_elastic_ep": (False,),
        "enable_eplb": (False,), "eplb_config": (),
        "expert_placement_strategy": ("linear",), "moe_backend": ("auto",), "all2all_backend": (),
        "enable_dbo": (False,), "ubatch_size": (0,), "dbo_decode_token_threshold": (32,),
        "dbo_prefill_token_threshold": (512,), "enable_return_routed_experts": (False,),
    },
}  # fmt: skip
FOREIGN: Mapping[str, Foreign] = MappingProxyType(
    {
        name: Foreign(neutral, instead)
        for instead, names in _TABLE.items()
        for name, neutral in names.items()
    }
)


def translated(options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Options under manta's names, of which ``known`` are allowed here, without those that ask for
    nothing: any that is None, and vLLM's at their neutral values.

    Raises ConfigError for one that is not known, with the nearest that is, for one of vLLM's that
    asks for what there is not, with what there is instead, and for one that is given twice.
    """
    own: dict[str, Any] = {}
    for name, value in options.items():
        meant = ALIASES.get(name, name)
        if meant in known:
            if value is None and meant != "model":
                continue
            if meant in own:
                raise ConfigError(f"{name} and {meant} are one option: give one of them")
            own[meant] = value
        elif name in FOREIGN:
            check(name, value)
        else:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown option {name}{hint}")
    return own


def check(name: str, value: Any) -> None:
    """Raises ConfigError if an option of vLLM's asks for what manta has not."""
    foreign = FOREIGN[name]
    if ANY not in foreign.neutral and not asks_for_nothing(value, foreign.neutral):
        raise ConfigError(f"{name}={value!r} is not supported: {foreign.instead}")
