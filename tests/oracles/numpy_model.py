"""The whole family in NumPy float64, written from the papers' equations and nothing else.

Loops where a loop says it best; nothing is fast, cached or absorbed. It takes a published
config.json and the tensors of that checkpoint under their published names. Equations: MLA is V2
(arXiv 2405.04434) eqs. 37-47, the routers V2 eqs. 20-22 and V3 (arXiv 2412.19437) eqs. 12-16, MTP
V3 eqs. 21-25, YaRN arXiv 2309.00071. Rows are handled one by one, so most arrays have no B.
"""

import dataclasses
import math

import numpy as np

# The norms on the two latents keep the default of the published code, whatever rms_norm_eps is.
LATENT_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """What one router decided: scores without the bias, chosen experts by rank, their weights."""

    scores_BTE: np.ndarray
    choice_BTK: np.ndarray
    weight_BTK: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """`hidden_BTD` is after the final norm; `mtp_logits` is [depth, B, T, V]; routing by layer."""

    logits_BTV: np.ndarray
    hidden_BTD: np.ndarray
    mtp_logits: np.ndarray
    routing: dict[int, Routing]


def forward(
    config: dict,
    weights: dict[str, np.ndarray],
    tokens_BT: np.ndarray,
    segments_BT: np.ndarray | None = None,
    positions_BT: np.ndarray | None = None,
) -> Result:
    """A token sees itself and the earlier tokens of its own segment.

    Without `segments_BT` a row is one document; without `positions_BT` tokens are counted from
    the start of the row. MTP depth k reads token 0 where t_{i+k} lies beyond the row.
    """
    B, T = tokens_BT.shape
    segments_BT = np.zeros((B, T), int) if segments_BT is None else segments_BT
    positions_BT = np.tile(np.arange(T), (B, 1)) if positions_BT is None else positions_BT
    rows = []
    for row in range(B):
        one = _Row(config, weights, tokens_BT[row], segments_BT[row], positions_BT[row])
        rows.append((*one.run(), one.routing))
    logits, hidden, mtp_logits, routing = zip(*rows, strict=True)
    return Result(
        logits_BTV=np.stack(logits),
        hidden_BTD=np.stack(hidden),
        mtp_logits=np.stack(mtp_logits, axis=1),
        routing={layer: _stack([r[layer] for r in routing]) for layer in routing[0]},
    )


def next_token_loss(
    logits_BTV: np.ndarray,
    tokens_BT: np.ndarray,
    *,
    shift: int = 1,
    segments_BT: np.ndarray | None = None,
) -> float:
    """Mean cross-entropy of t_{i+shift} over the positions whose target exists in their segment.

    Shift 1 is the main loss, k + 1 that of MTP depth k.
    """
    found_BTV, target_BT = logits_BTV[:, :-shift], tokens_BT[:, shift:]
    top_BT1 = found_BTV.max(-1, keepdims=True)
    log_sum_BT = np.log(np.exp(found_BTV - top_BT1).sum(-1)) + top_BT1[..., 0]
    loss_BT = log_sum_BT - np.take_along_axis(found_BTV, target_BT[..., None], -1)[..., 0]
    if segments_BT is None:
        return float(loss_BT.mean())
    return float(loss_BT[segments_BT[:, :-shift] == segments_BT[:, shift:]].mean())


def rotary_frequencies(config: dict) -> np.ndarray:
    """Radians per position for each rotary pair, [R/2]; with YaRN slow pairs are interpolated."""
    R, theta = config["qk_rope_head_dim"], config["rope_theta"]
    plain = np.array([theta ** (-2 * i / R) for i in range(R // 2)])
    yarn = config["rope_scaling"]
    if yarn is None:
        return plain

    def pair_turning(times: float) -> float:
        context = yarn["original_max_position_embeddings"]
        return R * math.log(context / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_turning(yarn["beta_slow"])), R - 1)
    width = high - low if high > low else 0.001
    interpolated = [min(max((i - low) / width, 0.0), 1.0) for i in range(R // 2)]
    return np.array(
        [
            f * (1 - part) + f / yarn["factor"] * part
            for f, part in zip(plain, interpolated, strict=True)
        ]
    )


def yarn_temperature(factor: float, mscale: float) -> float:
    """m(mscale) = 0.1 * mscale * ln(factor) + 1, and 1 where nothing is extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: dict) -> float:
    """(H + R)^-0.5, times m(mscale_all_dim)^2 under YaRN."""
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    yarn = config["rope_scaling"]
    if yarn is None:
        return scale
    return scale * yarn_temperature(yarn["factor"], yarn.get("mscale_all_dim", 0.0)) ** 2


def choose(
    config: dict, logits_E: np.ndarray, bias_E: np.ndarray | None
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """One token's scores, its experts by rank and their weights; a tie goes to the lower index.

    The bias takes part in choosing experts and groups, never in the weights.
    """
    K, scale = config["num_experts_per_tok"], config["routed_scaling_factor"]
    if config["scoring_func"] == "sigmoid":
        score_E = 1 / (1 + np.exp(-logits_E))
        rank_E, counted = score_E + bias_E, 2
    else:
        score_E = np.exp(logits_E - logits_E.max())
        score_E /= score_E.sum()
        rank_E, counted = score_E, 1
    candidates = list(range(len(rank_E)))
    if config["topk_method"] != "greedy":
        size = len(rank_E) // config["n_group"]
        members = [candidates[g * size : (g + 1) * size] for g in range(config["n_group"])]
        group_rank = [sum(sorted((rank_E[e] for e in m), reverse=True)[:counted]) for m in members]
        kept = _highest(group_rank, range(len(members)), config["topk_group"])
        candidates = [e for g in sorted(kept) for e in members[g]]
    chosen = _highest(rank_E, candidates, K)
    weight_K = score_E[chosen]
    if config["norm_topk_prob"]:
        weight_K = weight_K / (weight_K.sum() + 1e-20)
        if config["scoring_func"] == "softmax":
            return score_E, chosen, weight_K  # V2's code scales only what it does not normalise
    return score_E, chosen, weight_K * scale


def _highest(values: list | np.ndarray, among: list[int] | range, count: int) -> list[int]:
    return sorted(among, key=lambda i: (-values[i], i))[:count]


def _stack(routings: list[Routing]) -> Routing:
    names = [field.name for field in dataclasses.fields(Routing)]
    return Routing(**{n: np.concatenate([getattr(r, n) for r in routings]) for n in names})


def _rms_norm(x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + eps) * weight_D


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class _Row:
    """One row of tokens on its way through the network."""

    def __init__(
        self,
        config: dict,
        weights: dict[str, np.ndarray],
        tokens_T: np.ndarray,
        segments_T: np.ndarray,
        positions_T: np.ndarray,
    ):
        self.config, self.weights = config, weights
        self.tokens_T, self.positions_T = tokens_T, positions_T
        T = len(tokens_T)
        self.visible_TS = np.array(
            [[s <= t and segments_T[s] == segments_T[t] for s in range(T)] for t in range(T)]
        )
        self.routing: dict[int, Routing] = {}

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits [T, V], hidden states after the final norm [T, D], MTP logits [depth, T, V]."""
        last = self.config["num_hidden_layers"]
        x_TD = self.weights["model.embed_tokens.weight"][self.tokens_T]
        for layer in range(last):
            x_TD = self.block(x_TD, layer)
        hidden_TD = self.norm(x_TD, "model.norm")
        head_VD = self.weights["lm_head.weight"]
        mtp_logits = []
        h_TD = hidden_TD
        for depth in range(1, self.config.get("num_nextn_predict_layers", 0) + 1):
            h_TD = self.mtp(h_TD, depth, last + depth - 1)
            mtp_logits.append(h_TD @ head_VD.T)
        shape = (len(mtp_logits), *self.tokens_T.shape, len(head_VD))
        return hidden_TD @ head_VD.T, hidden_TD, np.array(mtp_logits).reshape(shape)

    def block(self, x_TD: np.ndarray, layer: int) -> np.ndarray:
        prefix = f"model.layers.{layer}"
        x_TD = x_TD + self.attention(self.norm(x_TD, f"{prefix}.input_layernorm"), prefix)
        y_TD = self.norm(x_TD, f"{prefix}.post_attention_layernorm")
        if layer < self.config["first_k_dense_replace"]:
            return x_TD + self.swiglu(y_TD, f"{prefix}.mlp")
        return x_TD + self.mixture(y_TD, layer)

    def mtp(self, h_TD: np.ndarray, depth: int, layer: int) -> np.ndarray:
        """h^k from h^{k-1}: the embedding of t_{i+k} comes first in what `eh_proj` reads."""
        prefix = f"model.layers.{layer}"
        ahead_T = np.concatenate([self.tokens_T[depth:], np.zeros(depth, int)])[: len(h_TD)]
        embedded_TD = self.norm(
            self.weights["model.embed_tokens.weight"][ahead_T], f"{prefix}.enorm"
        )
        both_TD = np.concatenate([embedded_TD, self.norm(h_TD, f"{prefix}.hnorm")], axis=-1)
        x_TD = self.block(self.linear(both_TD, f"{prefix}.eh_proj"), layer)
        return self.norm(x_TD, f"{prefix}.shared_head.norm")

    def attention(self, x_TD: np.ndarray, prefix: str) -> np.ndarray:
        config, prefix = self.config, f"{prefix}.self_attn"
        N, C = config["num_attention_heads"], config["kv_lora_rank"]
        H, R, W = (config[f] for f in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        if config["q_lora_rank"] is None:
            q = self.linear(x_TD, f"{prefix}.q_proj")
        else:
            latent_TQ = self.linear(x_TD, f"{prefix}.q_a_proj")
            latent_TQ = _rms_norm(
                latent_TQ, self.weights[f"{prefix}.q_a_layernorm.weight"], LATENT_EPS
            )
            q = self.linear(latent_TQ, f"{prefix}.q_b_proj")
        kv = self.linear(x_TD, f"{prefix}.kv_a_proj_with_mqa")
        latent_SC, k_rope_SR = kv[:, :C], self.rotate(kv[:, C:])
        latent_SC = _rms_norm(
            latent_SC, self.weights[f"{prefix}.kv_a_layernorm.weight"], LATENT_EPS
        )
        kv = self.linear(latent_SC, f"{prefix}.kv_b_proj")
        heads = []
        for n in range(N):
            q_head = q[:, n * (H + R) : (n + 1) * (H + R)]
            kv_head = kv[:, n * (H + W) : (n + 1) * (H + W)]
            score_TS = q_head[:, :H] @ kv_head[:, :H].T + self.rotate(q_head[:, H:]) @ k_rope_SR.T
            score_TS = np.where(self.visible_TS, score_TS * softmax_scale(config), -np.inf)
            heads.append(_softmax(score_TS) @ kv_head[:, H:])
        return self.linear(np.concatenate(heads, axis=-1), f"{prefix}.o_proj")

    def rotate(self, x_TR: np.ndarray) -> np.ndarray:
        """Turns neighbours (x0, x1), (x2, x3), ... as complex numbers by position * frequency."""
        yarn, size = self.config["rope_scaling"], 1.0
        if yarn is not None:
            size = yarn_temperature(yarn["factor"], yarn.get("mscale", 1.0))
            size /= yarn_temperature(yarn["factor"], yarn.get("mscale_all_dim", 0.0))
        angle = self.positions_T[:, None] * rotary_frequencies(self.config)
        turned = (x_TR[:, 0::2] + 1j * x_TR[:, 1::2]) * size * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x_TR.shape)

    def mixture(self, x_TD: np.ndarray, layer: int) -> np.ndarray:
        prefix = f"model.layers.{layer}.mlp"
        logits_TE = self.linear(x_TD, f"{prefix}.gate")
        bias_E = self.weights.get(f"{prefix}.gate.e_score_correction_bias")
        score_TE, choice_TK, weight_TK = zip(
            *(choose(self.config, logits_E, bias_E) for logits_E in logits_TE), strict=True
        )
        self.routing[layer] = Routing(
            scores_BTE=np.array([score_TE]),
            choice_BTK=np.array([choice_TK]),
            weight_BTK=np.array([weight_TK]),
        )
        y_TD = self.swiglu(x_TD, f"{prefix}.shared_experts")
        for t in range(len(x_TD)):
            for expert, weight in zip(choice_TK[t], weight_TK[t], strict=True):
                y_TD[t] += weight * self.swiglu(x_TD[t], f"{prefix}.experts.{expert}")
        return y_TD

    def swiglu(self, x: np.ndarray, prefix: str) -> np.ndarray:
        gate = self.linear(x, f"{prefix}.gate_proj")
        up = self.linear(x, f"{prefix}.up_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * up, f"{prefix}.down_proj")

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, x_TD: np.ndarray, name: str) -> np.ndarray:
        return _rms_norm(x_TD, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])
