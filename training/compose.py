"""Compose the untrained voxlm-135m from its two base models."""

import argparse

from voxlm_hf import VoxLMForSpeechSeq2Seq


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audio", default="openai/whisper-base", help="Hub id or folder of the encoder")
    parser.add_argument("--text", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder of the LLM")
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    model = VoxLMForSpeechSeq2Seq.from_base_models(
        audio=arguments.audio,
        text=arguments.text,
        projector_kind="convnext",
        projector_hidden_size=512,
        projector_readout="token_mixture",
        frame_gate_threshold=0.5,
        lora_config={"r": 8, "lora_alpha": 16},
        prompt="Copy the user's words exactly.",
        prompt_template="<|im_start|>user\n{audio}\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    )
    model.save_pretrained(arguments.output)
    model.processor.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
