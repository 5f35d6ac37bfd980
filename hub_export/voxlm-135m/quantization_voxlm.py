"""8-bit arithmetic for LLM and reader on CPUs."""

import warnings

import torch
from torch import nn
from transformers.utils import is_peft_available


if is_peft_available():
    from peft.tuners.lora import LoraLayer


def quantize_dynamic(model):
    """
    Fold LoRA into the LLM and compute its linear layers, and those of a reader, in 8 bits, in place: weights once, activations
    as they come.

    Two to three times faster on CPUs; texts differ a little from those of float32. The encoder stays as it is: in 8 bits its
    frames change too much. The model can transcribe and align afterwards, not be trained or saved.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): in float32, on the CPU.

    Returns:
        the model.

    Raises:
        ValueError: on another device or in another dtype.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"8-bit arithmetic is for float32 models on the CPU; this one is {model.dtype} on {model.device}"
        )
    with torch.no_grad():
        for name, module in list(model.language_model.named_modules()):
            if is_peft_available() and isinstance(module, LoraLayer):
                module.merge()
                model.language_model.set_submodule(name, module.get_base_layer())
        parts = [model.language_model]
        if model.reader is not None:
            embeddings = model.reader.decoder.embed_tokens.weight
            model.reader.head = nn.Linear(*embeddings.shape[::-1], bias=False)
            model.reader.head.weight = nn.Parameter(embeddings, requires_grad=False)
            parts.append(model.reader)
        with warnings.catch_warnings():
            # torch calls this API deprecated in favour of torchao, whose kernels are slower than float32 without a compiler.
            warnings.simplefilter("ignore")
            kinds = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
            for part in parts:
                torch.ao.quantization.quantize_dynamic(part, kinds, inplace=True)
    model.is_quantized_dynamically = True
    return model.eval()
