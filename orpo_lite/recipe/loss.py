"""Define the section loss of a recipe: the objective and its settings."""

from typing import Literal

from pydantic import Field

from orpo_lite.recipe.section import Section

LossType = Literal["orpo", "sft", "dpo", "cpo", "simpo", "probability_ratio", "reward", "ppo"]


class LossSection(Section):
    """The loss. The keys have the names of TRL's configs."""

    type: LossType = "orpo"
    """The loss. orpo: NLL(chosen) + beta * L_OR (arXiv 2403.07691, Eq. 6). sft: NLL(chosen). dpo:
    compares with a reference model (arXiv 2305.18290). cpo: DPO without the reference, plus the
    NLL (arXiv 2401.08417). simpo: mean log-probabilities and a margin (arXiv 2405.14734).
    probability_ratio: ORPO with P_w / P_l in place of the odds ratio (Appendix B). reward: a reward
    model, which gives a reply a number and writes no text (arXiv 2203.02155, Eq. 1). ppo: answers
    to the prompts are sampled, and a reward model scores them (arXiv 1707.06347)."""
    beta: float = Field(0.1, ge=0, allow_inf_nan=False)
    """orpo, probability_ratio: weight of the ratio term; the paper calls it λ, the authors' code
    alpha; 0 is sft. dpo, cpo, simpo: factor of the log-probabilities inside the sigmoid."""
    completion_only_loss: bool | None = None
    """true: the NLL counts only the response's tokens. false: it also counts the prompt's tokens.
    null: as TRL's trainer of this loss: false for orpo and probability_ratio, else true."""
    nll_reduction: Literal["token", "pair"] = "token"
    """How the NLL is averaged. token: over all counted tokens of the optimizer step. pair: first
    over the counted tokens of each pair, then over the pairs."""
    dpo_loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """dpo: function of the difference of the log-ratios. ipo divides each log-ratio by the number
    of its tokens (arXiv 2310.12036)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, allow_inf_nan=False)
    """dpo with sigmoid, cpo, simpo: assumed share of pairs whose replies are swapped."""
    rpo_alpha: float | None = Field(None, ge=0, allow_inf_nan=False)
    """dpo: weight of the chosen responses' NLL, which is added to the loss (arXiv 2404.19733).
    null: it is not added."""
    cpo_alpha: float | None = Field(None, ge=0, allow_inf_nan=False)
    """cpo, simpo: weight of the chosen responses' NLL. null: 1 for cpo, 0 for simpo."""
    simpo_gamma: float = Field(0.5, ge=0, allow_inf_nan=False)
    """simpo: target margin between the two rewards."""
    ratio_of: Literal["mean", "sum"] = "mean"
    """probability_ratio: P is the mean or the summed log-probability of a response's tokens."""
    reference_adapter_name_or_path: str | None = None
    """dpo: LoRA adapter of the reference model: a run's adapter folder or a hub name. base: the
    base without an adapter. null: the model as it is before the first step."""
    reward_adapter_name_or_path: str | None = None
    """ppo: LoRA adapter of the reward model on the same base: the adapter folder of a run with
    loss.type=reward, or a hub name. The value model starts as a copy of it."""
    response_length: int = Field(128, ge=1)
    """ppo: largest number of tokens of a sampled answer."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """ppo: temperature of the sampling."""
    num_ppo_epochs: int = Field(4, ge=1)
    """ppo: number of passes over the sampled answers of a step."""
    ppo_mini_batch_size: int = Field(8, ge=1)
    """ppo: number of answers of an update of the weights. A step samples
    training.global_batch_size answers."""
    kl_coef: float = Field(0.1, ge=0, allow_inf_nan=False)
    """ppo: weight of the KL divergence from the reference model, before the first step."""
    kl_target: float | None = Field(6.0, gt=0, allow_inf_nan=False)
    """ppo: KL divergence of an answer, in nats, to which the weight adapts (arXiv 1909.08593).
    null: the weight stays kl_coef."""
    kl_horizon: int = Field(2000, ge=1)
    """ppo: number of answers over which the weight adapts."""
    gamma: float = Field(0.99, ge=0, le=1)
    """ppo: discount factor of the rewards of later tokens."""
    lam: float = Field(0.95, ge=0, le=1)
    """ppo: λ of the generalized advantage estimation (arXiv 1506.02438)."""
    cliprange: float = Field(0.2, gt=0, allow_inf_nan=False)
    """ppo: the ratio of new to old probability is clipped to 1 - cliprange and 1 + cliprange."""
    cliprange_value: float = Field(0.2, gt=0, allow_inf_nan=False)
    """ppo: largest change of a value in a step that lowers the value loss."""
    vf_coef: float = Field(0.1, ge=0, allow_inf_nan=False)
    """ppo: weight of the value loss."""
    center_rewards_coefficient: float | None = Field(None, ge=0, allow_inf_nan=False)
    """reward: weight of the term (r_w + r_l)^2, which keeps the mean reward near 0
    (arXiv 2312.09244). null: no such term."""

    @property
    def trains_reward_model(self) -> bool:
        """True if the model gets a score head and returns rewards, not log-probabilities."""
        return self.type == "reward"

    @property
    def reference_adapter(self) -> str | None:
        """The adapter that ``reference_adapter_name_or_path`` names; None for null and base."""
        name = self.reference_adapter_name_or_path
        return None if name == "base" else name

    @property
    def counts_only_completion(self) -> bool:
        """``completion_only_loss`` as true or false."""
        if self.completion_only_loss is not None:
            return self.completion_only_loss
        return self.type not in ("orpo", "probability_ratio")
