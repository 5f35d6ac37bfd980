"""
Faster arithmetic on CPUs, for models that are done with training: packed weights (exact) and 8 bits (nearly).

One step of a search multiplies a handful of rows with every weight, which a general matrix product does slowly: oneDNN's is up to
four times as fast where the weights lie in its own order.
"""

import warnings

import torch
from torch import nn
from transformers.utils import is_peft_available


if is_peft_available():
    from peft.tuners.lora import LoraLayer


# Rows that oneDNN is told to expect; the order it chooses serves others as well.
ROWS = 8
# oneDNN writes code for every number of rows it meets and keeps it, half a megabyte each: more rows than these are multiplied block by
# block, and filled up to a multiple of these. Above a hundred rows blocks cost no time.
MOST_ROWS, ROWS_STEP = 128, 16


class PackedLinear(nn.Module):
    """
    A linear layer in float32 whose weight lies in oneDNN's order; without a gradient.

    Args:
        linear (`nn.Linear`)
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        # Neither parameter nor buffer: such a tensor can be neither copied to another device nor saved.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        blocks = [self._multiply(rows) for rows in inputs.reshape(-1, self.in_features).split(MOST_ROWS)]
        outputs = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        count = len(rows)
        missing = 0 if count <= ROWS else -count % ROWS_STEP
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")[:count]


def can_be_packed(model) -> bool:
    """Whether `pack_weights` takes a model."""
    return _is_float32_on_cpu(model) and torch.backends.mkldnn.is_available()


@torch.no_grad()
def pack_weights(model):
    """
    Fold LoRA into the LLM and put the weights of encoder, LLM and reader into the order in which the CPU multiplies them fastest, in
    place.

    Float32 as before, in about three quarters of the time. The model can transcribe and align afterwards, not be trained, saved or moved.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): in float32, on the CPU.

    Returns:
        the model.

    Raises:
        ValueError: on another device, in another dtype, a second time, or where torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise ValueError("This build of torch has no oneDNN, whose order of weights this is")
    for part in _parts(model):
        _pack(part)
    return model


@torch.no_grad()
def quantize_dynamic(model):
    """
    As `pack_weights`, and compute the linear layers of LLM and reader in 8 bits: weights once, activations as they come.

    In less than half the time of plain float32; texts differ a little from its. The encoder stays in float32: in 8 bits its frames change
    too much.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): in float32, on the CPU.

    Returns:
        the model.

    Raises:
        ValueError: on another device, in another dtype, or a second time.
    """
    encoder, *others = _parts(model)
    if torch.backends.mkldnn.is_available():
        _pack(encoder)
    with warnings.catch_warnings():
        # torch calls this API deprecated in favour of torchao, whose kernels are slower than float32 without a compiler.
        warnings.simplefilter("ignore")
        kinds = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        for part in others:
            torch.ao.quantization.quantize_dynamic(part, kinds, inplace=True)
    return model


def _is_float32_on_cpu(model) -> bool:
    return model.device.type == "cpu" and model.dtype == torch.float32


def _parts(model) -> list[nn.Module]:
    """Encoder, LLM and reader, if there is one, ready for other arithmetic: LoRA folded, the reader's scores by a layer."""
    if model.for_inference_only:
        raise ValueError(
            "The weights of this model are packed or in 8 bits already; load it anew for another arithmetic"
        )
    if not _is_float32_on_cpu(model):
        raise ValueError(
            f"This arithmetic is for float32 models on the CPU; this one is {model.dtype} on {model.device}"
        )
    for name, module in list(model.language_model.named_modules()):
        if is_peft_available() and isinstance(module, LoraLayer):
            module.merge()
            model.language_model.set_submodule(name, module.get_base_layer())
    model.for_inference_only = True
    model.eval()
    if model.reader is None:
        return [model.encoder, model.language_model]
    embeddings = model.reader.decoder.embed_tokens.weight
    model.reader.head = nn.Linear(*embeddings.shape[::-1], bias=False)
    model.reader.head.weight = nn.Parameter(embeddings, requires_grad=False)
    return [model.encoder, model.language_model, model.reader]


def _pack(part: nn.Module):
    """Pack the linear layers of a module in place, one after the other, so that little is in memory twice."""
    for name, module in list(part.named_modules()):
        if type(module) is nn.Linear:  # subclasses have ways of their own
            part.set_submodule(name, PackedLinear(module))
