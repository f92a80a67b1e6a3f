"""Our trainers for TRL train a vision-language model as with full logits, and as TRL's own do."""

import pytest

pytest.importorskip("trl", reason="trl needs Python 3.11")
pytest.importorskip("PIL")
import torch
from datasets import Dataset
from PIL import Image
from test_trl import Plain, assert_same_training, train, varied
from test_trl_distillation import make_trainer
from training.tiny import SHAPE, make_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import DistillationTrainer, GRPOTrainer

from em_kernels.trl import FusedDistillationTrainer, FusedGRPOTrainer

pytestmark = pytest.mark.slow  # each with transformers' Trainer, some seconds

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIDE, PATCH = 8, 4
VISION = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH}
VISION |= {"hidden_size": 16, "intermediate_size": 24, "projection_dim": 16}
VISION |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def make_processor():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_vision_model(processor, dtype):
    tokenizer = processor.tokenizer
    config = AutoConfig.for_model(
        "llava",
        vision_config=VISION,
        text_config={"model_type": "llama", **SHAPE, "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=dtype)


class PlainVision(Plain):
    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, pixel_values=None, **others
    ):
        def with_images(**inputs):
            return model(**inputs, pixel_values=pixel_values)

        found = super()._get_per_token_logps_and_entropies
        return found(with_images, input_ids, attention_mask, logits_to_keep)


def reward(completions, **others):
    return varied([message["content"] for message, *_ in completions])


def make_data(images):
    prompts = [[{"role": "user", "content": text}] for text in ("abc", "the the", "a", "What?")]
    columns = {"prompt": prompts}
    if images:
        columns["image"] = [Image.new("RGB", (9, 9), (70 * i, 200 - i, 30)) for i in range(4)]
    return Dataset.from_dict(columns), make_processor()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("images", [True, False])
def test_training_is_the_same(images, dtype, tmp_path):
    data = _, processor = make_data(images)
    settings = {"data": data, "reward": reward, "num_iterations": 2, "temperature": 0.8}
    kinds = (FusedGRPOTrainer, PlainVision if dtype == torch.float64 else GRPOTrainer)
    runs = [train(k, make_vision_model(processor, dtype), tmp_path, **settings) for k in kinds]
    assert_same_training(*runs, 1e-9 if dtype == torch.float64 else 1e-5)
    assert any("vision" in name and x.any() for name, x in runs[1][1].items()) == images


def test_distillation_is_the_same(tmp_path):
    data = _, processor = make_data(images=True)
    weights = []
    for kind in (FusedDistillationTrainer, DistillationTrainer):
        student, teacher = (make_vision_model(processor, torch.float32) for _ in range(2))
        before = {name: x.detach().clone() for name, x in student.named_parameters()}
        with torch.no_grad():
            teacher.get_output_embeddings().weight.mul_(1.5)
        trainer = make_trainer(kind, student, teacher, tmp_path, data=data, beta=0.5)
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    assert any("vision" in name and (x - before[name]).any() for name, x in weights[1].items())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
