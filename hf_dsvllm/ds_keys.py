# ruff: noqa: SIM905 - word lists are read more easily than quoted lists
"""The names DeepSpeed 0.19.8 understands in its JSON, and those it has removed.

DeepSpeed checks names only inside `zero_optimization`, and late.  tests/unit/test_ds_keys.py compares these sets
with the installed DeepSpeed's own classes, so that a new release shows up as a failing test.
"""

from __future__ import annotations

TOP_LEVEL_KEYS = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    optimizer scheduler fp16 bf16 bfloat16 torch_autocast communication_data_type seq_parallel_communication_data_type
    prescale_gradients gradient_predivide_factor gradient_allreduce_op gradient_clipping zero_optimization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown
    dump_state disable_allgather disable_python_gc log_level dataloader_drop_last vocabulary_size aio
    activation_checkpointing flops_profiler autotuning comms_logger tensorboard wandb csv_monitor comet
    data_efficiency data_types checkpoint datastates_ckpt compile timers hybrid_engine pipeline tensor_parallel
    expert_parallel use_data_before_expert_parallelism weight_quantization inference
    """.split()
)

ZERO_KEYS = frozenset(
    """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions
    allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint offload_param
    offload_optimizer zenflow sub_group_size cpu_offload_param cpu_offload_use_pin_memory cpu_offload
    stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
    stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save
    stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
    stage3_gather_fp16_weights_on_model_save prefetch_bucket_size param_persistence_threshold
    model_persistence_threshold max_live_parameters max_reuse_distance gather_16bit_weights_on_model_save
    module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential ignore_unused_parameters
    legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
    override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
    """.split()
)

OFFLOAD_KEYS = frozenset(
    """
    device nvme_path buffer_count buffer_size max_in_cpu pin_memory pipeline_read pipeline_write fast_init ratio
    super_offload cpuadam_cores_perc
    """.split()
)

AIO_KEYS = frozenset("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds".split())

DATA_TYPE_KEYS = frozenset("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules".split())

# transformers/integrations/deepspeed.py fills exactly these.
FILLED_AUTO = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping fp16.enabled
    bf16.enabled optimizer.params.lr optimizer.params.betas optimizer.params.eps optimizer.params.weight_decay
    scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr scheduler.params.warmup_num_steps
    scheduler.params.total_num_steps zero_optimization.reduce_bucket_size
    """.split()
)
FILLED_AUTO_STAGE3 = frozenset(
    """
    zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold
    """.split()
)

REMOVED_TOP_LEVEL = {
    "nebula": "checkpoints would silently be written by torch.save",
    "compression_training": "the model would train uncompressed",
    "amp": "NVIDIA Apex is gone; use bf16 or fp16",
    "quantize_training": "Mixture-of-Quantization is gone",
    "sparse_gradients": "embedding gradients would be reduced dense",
    "eigenvalue": "it served Mixture-of-Quantization only",
    "sparse_attention": "use an attention implementation of transformers instead",
    "elasticity": "set the batch sizes directly",
    "graph_harvesting": "use torch.compile",
    "curriculum_learning": "use data_efficiency",
    "progressive_layer_drop": "the feature is gone",
}

REMOVED_ZERO = {
    "mics_shard_size": "MiCS is gone; zero_hpz_partition_size shards within a node",
    "mics_hierarchical_params_gather": "MiCS is gone",
    "zeropp_loco_param": "LoCo is gone; plain ZeRO++ quantised gradients remain",
}

REMOVED_OPTIMIZERS = frozenset({"onebitadam", "onebitlamb", "zerooneadam"})
