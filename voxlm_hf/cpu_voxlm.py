"""
Faster inference on CPUs, after training: packed weights (exact) and 8 bits (nearly).

One step of a search multiplies a few rows with every weight, which a general matrix product does slowly: oneDNN's is up to
four times as fast when the weights lie in its own order.
"""

import warnings

import torch
from torch import nn

from .loading_voxlm import lora_layers, merge_lora


# Rows that oneDNN is told to expect; the order it chooses serves others as well. Chosen by hand, a little more than the
# reader's beams.
ROWS = 8
# oneDNN generates code for every number of rows that it meets and keeps it, half a megabyte each (400 MB after an hour of
# audio): more rows than this are multiplied block by block, and padded to a multiple of ROWS_STEP. Above a hundred rows,
# blocks cost no time.
MAX_ROWS, ROWS_STEP = 128, 16


class PackedLinear(nn.Module):
    """
    A linear layer in float32 whose weight lies in oneDNN's order; without a gradient. No library offers one for eager mode.

    Args:
        linear (`nn.Linear`)
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        # Neither parameter nor buffer: such a tensor can be neither copied to another device nor saved.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        blocks = [self._multiply(rows) for rows in inputs.reshape(-1, self.in_features).split(MAX_ROWS)]
        outputs = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        count = len(rows)
        missing = 0 if count <= ROWS else -count % ROWS_STEP
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")[:count]


class VoxLMInferenceMixin:
    """Methods that make a model faster on the CPU. It can transcribe and align afterwards, but not be trained, saved or moved."""

    @torch.no_grad()
    def pack_weights(self):
        """
        Fold LoRA into the LLM (where the reader's texts are judged without it, it stays beside it) and put the weights of
        encoder, LLM and reader into the order in which oneDNN multiplies them fastest, in place. Float32 as before, in about
        three quarters of the time.

        Returns:
            the model.

        Raises:
            ValueError: for a model that is not in float32 on the CPU, a second time, or where torch has no oneDNN.
        """
        if not torch.backends.mkldnn.is_available():
            raise ValueError("This build of torch has no oneDNN, in whose order the weights would be packed")
        for part in _inference_parts(self):
            _pack(part)
        return self

    @torch.no_grad()
    def quantize_dynamic(self):
        """
        Pack the encoder's weights, and quantize the linear layers of LLM and reader to 8 bits in place: weights once,
        activations on the fly. In less than half the time of plain float32; texts differ a little. The encoder stays in
        float32: in 8 bits its frames change too much (some to a cosine of 0.3).

        Returns:
            the model.

        Raises:
            ValueError: for a model that is not in float32 on the CPU, or a second time.
        """
        encoder, *others = _inference_parts(self)
        if torch.backends.mkldnn.is_available():
            _pack(encoder)
        with warnings.catch_warnings():
            # torch calls this API deprecated in favour of torchao, whose kernels are slower than float32 without a compiler.
            warnings.simplefilter("ignore")
            settings = torch.ao.quantization.per_channel_dynamic_qconfig
            for part in others:
                torch.ao.quantization.quantize_dynamic(part, dict.fromkeys(_linears(part), settings), inplace=True)
        return self


def can_be_packed(model) -> bool:
    """Whether a model's `pack_weights` works here."""
    return _is_float32_on_cpu(model) and torch.backends.mkldnn.is_available()


def _is_float32_on_cpu(model) -> bool:
    return model.device.type == "cpu" and model.dtype == torch.float32


def _inference_parts(model) -> list[nn.Module]:
    """Encoder, LLM and reader, if there is one, with LoRA folded in and the reader's output layer as a layer of its own."""
    if model.for_inference_only:
        raise ValueError("The weights of this model are packed or in 8 bits already; load it anew to change them again")
    if not _is_float32_on_cpu(model):
        raise ValueError(
            f"Only float32 models on the CPU can be packed or quantized; this one is {model.dtype} on {model.device}"
        )
    if not model.config.judges_without_audio:
        merge_lora(model.language_model)
    model.for_inference_only = True
    model.eval()
    if model.reader is None:
        return [model.encoder, model.language_model]
    embeddings = model.reader.decoder.embed_tokens.weight
    model.reader.head = nn.Linear(*embeddings.shape[::-1], bias=False)
    model.reader.head.weight = nn.Parameter(embeddings, requires_grad=False)
    return [model.encoder, model.language_model, model.reader]


def _linears(part: nn.Module) -> list[str]:
    """Names of the linear layers of a module, without those whose weight a LoRA layer computes with: its own and DoRA's base."""
    kept = set()
    for _, layer in lora_layers(part):
        own = layer.modules() if any(layer.use_dora.values()) else (*layer.lora_A.modules(), *layer.lora_B.modules())
        kept.update(map(id, own))
    # Subclasses have their own arithmetic.
    return [name for name, module in part.named_modules() if type(module) is nn.Linear and id(module) not in kept]


def _pack(part: nn.Module):
    """Pack the linear layers of a module in place, one after the other, so that little is in memory twice."""
    for name in _linears(part):
        part.set_submodule(name, PackedLinear(part.get_submodule(name)))
