"""A small language model as the own code of a checkpoint. ``config.twist`` names one thing that it does otherwise than most models."""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, twist="none", hidden_size=64, num_hidden_layers=4, vocab_size=128, num_attention_heads=4, **kwargs):
        self.twist, self.hidden_size, self.num_hidden_layers = twist, hidden_size, num_hidden_layers
        self.vocab_size, self.num_attention_heads = vocab_size, num_attention_heads
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


#: Twists with arguments of blocks that are computed from tokens, and with extra outputs that blocks hand on to the next.
PER_ROW = ("table", "first_embedding", "shifted_rows", "of_block")
HANDED_ON = (
    "handed_on", "handed_on_ranks", "handed_on_rows", "handed_on_flat", "handed_on_wider", "handed_on_late", "handed_on_scaled"
)  # fmt: skip


class Scaled(nn.Linear):
    """A Linear that scales its input."""

    def forward(self, x):
        return super().forward(2 * x)


class ToyBlock(nn.Module):
    def __init__(self, config, index, common):
        super().__init__()
        d = config.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), (Scaled if config.twist == "scaled_linear" else nn.Linear)(2 * d, d)
        self.twist, self.index, self.heads = config.twist, index, config.num_attention_heads
        self.common = [common]  # in a list, so that it is not a module of the block
        self.calls = 0
        self.register_buffer("largest", torch.zeros(()), persistent=False)

    def attention(self, x, mask, memory):
        b, t, d = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.twist == "memory" and memory is not None:
            memory.append(k)
            k, v, mask = torch.cat(memory, 2), v.repeat(1, 1, len(memory), 1), None
        if self.twist == "shared_values":
            if self.index == 0:
                self.common[0]["values"] = v
            v = v + self.common[0]["values"]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] == k.shape[2])
        return self.out(y.transpose(1, 2).reshape(b, t, d))

    def forward(self, hidden_states, mask=None, memory=None, beside=None):
        h = hidden_states
        if self.twist in PER_ROW:
            h = h + beside
        if self.twist == "in_place":
            h.mul_(1.5)
        h = h + self.attention(self.norm1(h), mask, memory)
        h = h + self.down(functional.gelu(self.up(self.norm2(h))))
        if self.twist == "dropout":
            h = functional.dropout(h, 0.2)
        if self.twist == "counter":
            self.calls += 1
            h = h * (1 + self.calls % 2)
        if self.twist == "running_maximum":
            self.largest = torch.maximum(self.largest, h.detach().abs().max())
            h = h / self.largest
        if self.twist == "mixes_rows":
            h = h - h.mean(0, keepdim=True)
        if self.twist == "float64" and self.index == 1:
            h = h.double()
        if self.twist == "tuple_later" and self.index > 0:
            return h, None
        if self.twist in HANDED_ON:  # the first block makes it, and some blocks only pass it on
            if beside is None or self.index % 2 == 0:
                made = self.norm1(h).argsort(-1)[..., :3] if self.twist == "handed_on_ranks" else torch.tanh(h[..., :8])
                beside = made if beside is None or self.twist == "handed_on_ranks" else made + beside
            if self.twist == "handed_on_rows":
                beside = beside + beside.mean(0, keepdim=True)
            if self.twist == "handed_on_flat":
                beside = beside.mean(0)
            if self.twist == "handed_on_wider" and self.index == 2:
                beside = torch.cat([beside, beside], -1)
            chosen = h.gather(-1, beside) if self.twist == "handed_on_ranks" else beside
            return torch.cat([h[..., :-1], h[..., -1:] + chosen.mean(-1, keepdim=True)], -1), beside
        return h


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    _no_split_modules = ("ToyBlock",)

    def _init_weights(self, module):
        pass


class ToyForCausalLM(ToyModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        common = {}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyBlock(config, i, common) for i in range(config.num_hidden_layers))
        if config.twist == "table":
            self.table = nn.Embedding(config.vocab_size, config.hidden_size * config.num_hidden_layers)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.twist, self.calls = config.twist, 0
        if config.twist == "hook":
            self.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def order(self):
        n = list(range(len(self.layers)))
        return {"looped": n + n, "twice_in_a_row": [0, 1, 1, 2, 3], "other_order": [0, 2, 1, 3], "skips_one": [0, 1, 3]}.get(self.twist, n)

    def forward(self, input_ids=None, use_cache=None, attention_mask=None, **kwargs):
        twist, h = self.twist, self.embed(input_ids)
        if twist == "dropout_before":
            h = functional.dropout(h, 0.2)
        embedded = first = h
        mask, memory = None, [] if twist == "memory" else None
        if twist == "mask_of_padding":  # token 5 is never attended to, except by itself
            t = input_ids.shape[1]
            seen = (input_ids != 5)[:, None, None, :] & torch.ones(t, t, dtype=torch.bool, device=h.device).tril()
            mask = seen | torch.eye(t, dtype=torch.bool, device=h.device)
        outs = []
        tables = self.table(input_ids) if twist == "table" else embedded.repeat(1, 1, len(self.layers))
        tables = tables.view(*input_ids.shape, len(self.layers), -1)
        for step, i in enumerate(self.order()):
            if twist == "scaled_between" and step:
                h = h * 0.5
            if twist == "scaled_in_place" and step:
                h.mul_(0.5)
            if twist == "embeddings_between" and step == 2:
                h = h + embedded
            beside = {"table": tables[:, :, i], "first_embedding": embedded, "shifted_rows": embedded.roll(1, 0), "of_block": h}.get(twist)
            if twist in HANDED_ON and step:
                beside = outs[0 if twist == "handed_on_late" else -1][1]
                if twist == "handed_on_scaled":
                    beside = 2 * beside
            out = self.layers[i](h, mask, memory, beside)
            outs.append(out)
            h = out[0] if isinstance(out, tuple) else out
            if twist == "early_exit" and i == 1:
                self.lm_head(self.norm(h))
            if i == 1 and step == 1:
                first = h
        if twist == "last_in_place":
            h.mul_(0.5)
        if twist == "skip":
            h = h + first
        if twist == "embeddings_after":
            h = h + embedded
        if twist == "tokens_after":
            h = h * (1 + (input_ids % 3)[..., None])
        if twist == "counter_after":
            self.calls += 1
            h = h + self.calls % 2 * embedded
        if twist == "rows_after":
            h = h - h.mean(0, keepdim=True)
        h = self.norm(h)
        if twist == "head_function":
            return CausalLMOutputWithPast(logits=functional.linear(h, self.lm_head.weight))
        logits = self.lm_head(h)
        if twist == "softcap":
            logits = 5 * torch.tanh(logits / 5)
        if twist == "mixed_logits":
            logits = logits + first.mean(-1, keepdim=True)
        if twist == "logits_of_tokens":
            logits = logits * (1 + (input_ids % 3)[..., None])
        return CausalLMOutputWithPast(logits=logits)
