"""SAM runs inside training frameworks. Each has a module here, which needs that framework installed.

    fused_sam.integrations.lightning      SAMMixin, two_pass_step
    fused_sam.integrations.accelerate     AcceleratedSAM
    fused_sam.integrations.transformers   SAMTrainer, SAMTrainerMixin
"""
