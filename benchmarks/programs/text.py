"""Language: flair, Stanza, OpenNMT-py."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .program import CONVERT, KEYWORD, Program, Running, training_step

FIELD = "text"


def flair_tagger(layers: ModuleType) -> Running:
    from flair.data import Dictionary, Sentence
    from flair.embeddings import OneHotEmbeddings
    from flair.models import SequenceTagger

    logging.getLogger("flair").setLevel(logging.ERROR)
    words, tags = [f"word{i}" for i in range(200)], ["A", "B", "C", "D"]
    vocabulary, labels = Dictionary(add_unk=True), Dictionary(add_unk=False)
    for word in words:
        vocabulary.add_item(word)
    for tag in tags:
        labels.add_item(tag)
    sentences = []
    for _ in range(16):
        drawn = torch.randint(200, (int(torch.randint(10, 40, ())),)).tolist()
        sentence = Sentence([words[i] for i in drawn])
        for token, i in zip(sentence, drawn):
            token.add_label("pos", tags[i % 4])
        sentences.append(sentence)
    tagger = SequenceTagger(
        embeddings=OneHotEmbeddings(vocabulary, embedding_length=100),
        tag_dictionary=labels,
        tag_type="pos",
        rnn=layers.LSTM(100, 256, batch_first=True, bidirectional=True),
    )

    def forget() -> None:
        # tokens keep what was computed for them; flair's trainer drops it after each step, too
        for sentence in sentences:
            sentence.clear_embeddings()

    def outputs() -> Tensor:
        forget()
        tagger.eval()
        ordered = sorted(sentences, key=len, reverse=True)
        scores = tagger.forward(*tagger._prepare_tensors(ordered))[0]
        return scores.clamp(min=-100)  # forbidden transitions have -10000

    def loss() -> Tensor:
        forget()
        total, tokens = tagger.train().forward_loss(sentences)
        return total / tokens

    return Running(tagger, training_step(tagger, loss), outputs)


def stanza_charlm() -> Running:
    from stanza.models.common.char_model import CharacterLanguageModel

    args: dict[str, Any] = {
        "char_emb_dim": 100,
        "char_hidden_dim": 512,
        "char_num_layers": 1,
        "char_dropout": 0.05,
        "char_unit_dropout": 1e-6,
        "char_rec_dropout": 0.0,
    }
    model = CharacterLanguageModel(args, {"char": [chr(i) for i in range(97)]})
    characters, lengths = torch.randint(97, (16, 51)), [50] * 16

    def forward() -> Tensor:
        return model(characters[:, :-1], lengths)[2]

    def loss() -> Tensor:
        model.train()
        return nn.functional.cross_entropy(forward().flatten(0, 1), characters[:, 1:].flatten())

    def outputs() -> Tensor:
        model.eval()
        return forward()

    return Running(model, training_step(model, loss), outputs)


def opennmt() -> Running:
    from onmt.decoders.decoder import InputFeedRNNDecoder
    from onmt.encoders.rnn_encoder import RNNEncoder
    from onmt.models import NMTModel
    from onmt.modules import Embeddings

    def embeddings() -> Embeddings:
        return Embeddings(word_vec_size=128, word_vocab_size=1000, word_padding_idx=1)

    encoder = RNNEncoder("LSTM", True, 2, 256, 0.3, embeddings())
    decoder = InputFeedRNNDecoder("LSTM", True, 2, 256, dropout=0.3, embeddings=embeddings())
    model = NMTModel(encoder, decoder)
    generator = nn.Linear(256, 1000)
    both = nn.ModuleList([model, generator])
    source, target = torch.randint(2, 1000, (16, 20, 1)), torch.randint(2, 1000, (16, 21, 1))
    lengths = torch.randint(5, 21, (16,))

    def forward() -> Tensor:
        return generator(model(source, target, lengths)[0])

    def loss() -> Tensor:
        both.train()
        scores = forward()
        return nn.functional.cross_entropy(scores.flatten(0, 1), target[:, 1:].flatten())

    def outputs() -> Tensor:
        both.eval()
        return forward()

    return Running(both, training_step(both, loss), outputs)


PROGRAMS = (
    Program(
        name="flair SequenceTagger",
        field=FIELD,
        requires=("flair",),
        way=KEYWORD,
        timed="a training step with CRF on 16 sentences",
        build=flair_tagger,
        note=(
            "`SequenceTagger(rnn=fused_rnn.LSTM(...))`. Its other layers come from a table of classes made at "
            "import, which the patch reaches only if flair is imported inside."
        ),
    ),
    Program(
        name="Stanza CharacterLanguageModel",
        field=FIELD,
        requires=("stanza",),
        way=CONVERT,
        timed="a training step on 16 x 50 characters",
        build=stanza_charlm,
        note=(
            "Packed batches. With `char_rec_dropout` above 0 Stanza runs cells in a loop of its own; they are "
            "converted as well."
        ),
    ),
    Program(
        name="OpenNMT-py",
        field=FIELD,
        requires=("OpenNMT-py",),
        way=CONVERT,
        timed="a training step of translation, 16 sentences",
        build=opennmt,
        note=("The encoder's LSTM and the decoder's stacked `LSTMCell`s with input feeding."),
    ),
)
