"""Compressed models in a plain Trainer, and with PEFT's adapters."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from tnlm.recovery.examples import collate, training_set
from tnlm.recovery.training import finetune

# peft asks a model by the name that transformers is giving up.
OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@OLD_NAME
@pytest.mark.parametrize("scheme", ["svd", "kron"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_plain_trainer_works(kind, scheme, adapters, model_of, data_of, tmp_path, loss_of):
    model, given = model_of(kind, scheme), data_of(kind)
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    before = loss_of(model, given)
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True,
        num_train_epochs=2, save_strategy="no", dataloader_pin_memory=False,
        activation_checkpointing=True,
    )  # fmt: skip
    examples = training_set(given["data"], max_length=16)
    Trainer(model, arguments, data_collator=collate, train_dataset=examples).train()
    assert loss_of(model, given) < before


@OLD_NAME
def test_adapters_alone_are_trained(model_of, data_of):
    model = get_peft_model(model_of("llama", "svd"), LoraConfig(target_modules=["left"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finetune(model, **data_of("llama"), learning_rate=1e-2, progress=False)
    changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert changed
    assert all("lora_" in name for name in changed)
