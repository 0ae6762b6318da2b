"""sentence-transformers: a loss for its trainer, with questions as rows and answers as columns."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

import dml_cuda

COLOURS = {"sky": "blue", "grass": "green", "sun": "yellow"}
WORDS = ["what", "is", "the", "colour", "of", "it", *COLOURS, *COLOURS.values()]


class PairsLoss(torch.nn.Module):
    """Of (question, answer): NT-Xent from each question to all answers."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model
        self.loss = dml_cuda.NTXentLoss(temperature=0.05)

    def forward(self, sentences: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        questions, answers = (self.model(features)["sentence_embedding"] for features in sentences)
        match = torch.arange(len(questions), device=questions.device)
        return self.loss(questions, match, ref_emb=answers, ref_labels=match)


def untrained(folder: Path) -> SentenceTransformer:
    """A small model of random weights; for your training, SentenceTransformer("name of a model")."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trunk = Transformer(str(folder))
    return SentenceTransformer(modules=[trunk, Pooling(32)], device="cpu")


def main() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        model = untrained(Path(folder))
        pairs = [
            (f"what is the colour of the {thing}", f"it is {colour}") for thing, colour in COLOURS.items()
        ]
        questions, answers = zip(*pairs, strict=True)
        data = Dataset.from_dict({"question": questions * 8, "answer": answers * 8})
        arguments = Arguments(
            folder,
            num_train_epochs=10,
            per_device_train_batch_size=3,
            learning_rate=5e-3,
            logging_steps=8,
            save_strategy="no",
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=PairsLoss(model))
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
