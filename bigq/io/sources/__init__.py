"""How weights are stored in a source checkpoint, and how they become plain tensors: one file each, which implements ``base.Source``.

``plain`` is a tensor of the weight's own shape in fp32, fp16 or bf16; ``joined`` is several such tensors, one behind the other.
``packed`` is a Linear in one of the packed formats.
``coded`` makes weights in fp8, int8 or fp4 look like plain tensors, which are decoded as they are read; ``integers`` does so with packed
Linears that are to be quantized again.
"""
