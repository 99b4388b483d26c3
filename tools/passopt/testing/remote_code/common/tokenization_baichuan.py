# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 - transformers wants plain lists on the class
"""A slow tokenizer around a sentencepiece model, laid out like a published Baichuan2 checkpoint's."""

import os
import shutil

import sentencepiece
from transformers.tokenization_utils import AddedToken, PreTrainedTokenizer
from transformers.utils import logging

logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model"}


def _as_added_token(token):
    return AddedToken(token, lstrip=False, rstrip=False) if isinstance(token, str) else token


class BaichuanTokenizer(PreTrainedTokenizer):
    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=None,
        sp_model_kwargs=None,
        add_bos_token=True,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        **kwargs,
    ):
        self.sp_model_kwargs = sp_model_kwargs or {}
        # Published checkpoints call the base class before sp_model exists. Some versions of transformers ask
        # for the vocabulary in there and fail; loaders have to cope, so the order stays.
        super().__init__(
            unk_token=_as_added_token(unk_token),
            bos_token=_as_added_token(bos_token),
            eos_token=_as_added_token(eos_token),
            pad_token=_as_added_token(pad_token),
            sp_model_kwargs=self.sp_model_kwargs,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
        self.vocab_file = vocab_file
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.sp_model = self._load_sp_model()

    def _load_sp_model(self):
        sp_model = sentencepiece.SentencePieceProcessor(**self.sp_model_kwargs)
        sp_model.Load(self.vocab_file)
        return sp_model

    def __getstate__(self):
        return self.__dict__ | {"sp_model": None}

    def __setstate__(self, state):
        self.__dict__ = state
        self.sp_model = self._load_sp_model()

    @property
    def vocab_size(self):
        return self.sp_model.get_piece_size()

    def get_vocab(self):
        pieces = {self.convert_ids_to_tokens(index): index for index in range(self.vocab_size)}
        return pieces | self.added_tokens_encoder

    def _tokenize(self, text):
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp_model.IdToPiece(index)

    def convert_tokens_to_string(self, tokens):
        # Special tokens are text of their own: sentencepiece would drop or garble them.
        text, pending, after_special = "", [], True
        for token in tokens:
            if token not in self.all_special_tokens:
                pending.append(token)
                after_special = False
                continue
            text += ("" if after_special else " ") + self.sp_model.decode(pending) + token
            pending, after_special = [], True
        return text + self.sp_model.decode(pending)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        if not os.path.isdir(save_directory):
            logger.error(f"{save_directory} is not a directory: the vocabulary was not saved")
            return None
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = os.path.join(save_directory, prefix + VOCAB_FILES_NAMES["vocab_file"])
        if not os.path.isfile(self.vocab_file):
            with open(target, "wb") as stream:
                stream.write(self.sp_model.serialized_model_proto())
        elif os.path.abspath(self.vocab_file) != os.path.abspath(target):
            shutil.copyfile(self.vocab_file, target)
        return (target,)

    def _enclose(self, ids, bos, eos):
        return bos * self.add_bos_token + ids + eos * self.add_eos_token

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        bos, eos = [self.bos_token_id], [self.eos_token_id]
        second = [] if token_ids_1 is None else self._enclose(token_ids_1, bos, eos)
        return self._enclose(token_ids_0, bos, eos) + second

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        second = [] if token_ids_1 is None else self._enclose([0] * len(token_ids_1), [1], [1])
        return self._enclose([0] * len(token_ids_0), [1], [1]) + second

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None):
        second = [] if token_ids_1 is None else self._enclose([1] * len(token_ids_1), [1], [1])
        return self._enclose([0] * len(token_ids_0), [0], [0]) + second
