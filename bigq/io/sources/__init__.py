"""How weights are stored in a source checkpoint, and how they become plain tensors: one file each, which implements ``base.Source``.

``plain`` is a tensor of the weight's own shape in fp32, fp16 or bf16. ``packed`` is a Linear in one of the packed formats. A new
storage (FP8 with block scales, MXFP4) is a new file; ``bigq.model.pager.Pager._find_sources`` chooses the source of each weight.
"""
