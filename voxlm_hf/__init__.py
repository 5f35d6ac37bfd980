"""VoxLM: speech to text with an LLM, with word times and word confidences, native to transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor

from .configuration_voxlm import PRESETS, VoxLMConfig
from .modeling_voxlm import VoxLMForSpeechSeq2Seq
from .pipeline_voxlm import VoxLMASRPipeline
from .processing_voxlm import VoxLMProcessor
from .transcription_voxlm import VoxLMTranscription


__version__ = "0.1.0"

AutoConfig.register("voxlm", VoxLMConfig)
AutoModel.register(VoxLMConfig, VoxLMForSpeechSeq2Seq)
AutoModelForSpeechSeq2Seq.register(VoxLMConfig, VoxLMForSpeechSeq2Seq)
AutoProcessor.register(VoxLMConfig, VoxLMProcessor)

__all__ = [
    "PRESETS",
    "VoxLMASRPipeline",
    "VoxLMConfig",
    "VoxLMForSpeechSeq2Seq",
    "VoxLMProcessor",
    "VoxLMTranscription",
]
