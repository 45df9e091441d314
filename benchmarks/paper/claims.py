"""The claims of the paper: the text of each experiment, and the function that tries it."""

from benchmarks.paper import answers
from benchmarks.paper.experiments import (
    LAMBDAS,
    SAMPLES,
    Experiment,
    diversity,
    formats,
    orpo,
    passes,
    ratio,
    sft,
    spread,
    weight,
    wins,
)
from benchmarks.paper.study import MAIN, SECOND

LOGPS = (
    "Log-probabilities are means over the tokens of a reply (Eq. 3). They are measured on pairs "
    "that were not trained on, and also on the training pairs."
)
SMALL = (
    "The bases are small story models that cannot answer instructions, and a few hundred pairs "
    "teach them little about which reply is better."
)

EXPERIMENTS: dict[str, Experiment] = {
    "E0": Experiment(
        "The spread of the two ratios",
        "Fig. 6, Appendix B",
        "For two random probabilities, the log odds ratio has a much wider distribution than the "
        "log probability ratio times β.",
        f"{SAMPLES:,} samples of X1 and X2, uniform between 0 and 1. Exact values: 2β² for "
        "β(log X1 - log X2), and 2π²/3 for logit X1 - logit X2.",
        "This is a fact about uniform probabilities. The paper concludes that a loss on the odds "
        "ratio is satisfied without an extreme contrast between the two replies. The samples do "
        "not show that: the probability of a reply is not uniform, and where it is small, log odds "
        "and log-probability are nearly equal (see E4).",
        spread,
    ),
    "E1": Experiment(
        "SFT also makes rejected replies likely",
        "Fig. 3, Section 3",
        "Fine-tuning on the chosen replies alone raises the log-probability of the rejected "
        "replies too. The NLL has nothing that holds rejected replies back.",
        f"SFT on both bases. {LOGPS} The paper gives no number for the rise: 0.5 nat is the limit "
        "of this study, well above the noise of its runs.",
        "Part of the rise is the chat template and the style of the data, which are new to the "
        "bases. The paper's model, OPT-350M, has about 1,350 times the parameters of stories260k.",
        sft,
        ((MAIN, "sft"), (SECOND, "sft")),
    ),
    "E2": Experiment(
        "ORPO separates the two replies",
        "Fig. 7, Section 7",
        "ORPO learns the chosen replies and holds the rejected ones back: the ratio between the "
        "two grows during the training. With SFT, both replies become likely.",
        f"SFT, and ORPO with λ = 1, on both bases with the same pairs in the same order. {LOGPS} "
        "The paper draws its figure from training batches.",
        f"{SMALL} A lower rejected log-probability alone is no success, because the chosen one is "
        "lower too: ORPO ends with less likely chosen replies than SFT. In the paper's figure the "
        "rejected log-probability itself falls. That stronger form is a row of the second table, "
        "and no part of the verdict.",
        orpo,
        ((MAIN, "sft"), (MAIN, "orpo-1"), (SECOND, "sft"), (SECOND, "orpo-1")),
    ),
    "E3": Experiment(
        "A larger λ separates more, and costs likelihood",
        "Fig. 9, Appendix E",
        "As λ grows, the margin between chosen and rejected replies grows, and the chosen "
        "replies end with a lower log-probability.",
        f"ORPO with λ = 0.1, 0.5, 1 and 5, from the same base and pairs. {LOGPS} Each step from "
        "one λ to the next must hold.",
        f"{SMALL} The paper compares λ = 0.1, 0.5 and 1 with Mistral 7B on UltraFeedback.",
        weight,
        tuple((MAIN, f"orpo-{name}") for name in LAMBDAS),
    ),
    "E4": Experiment(
        "The odds ratio, or the probability ratio of sums",
        "Fig. 8, Appendix B",
        "With the probability ratio (Eq. 16) in place of the odds ratio, the rejected replies are "
        "pushed too far: their log-probability falls under -4. With the odds ratio it does not.",
        "ORPO with λ = 1, and the probability ratio with weight 1, of mean and of summed "
        f"log-probabilities. {LOGPS} As printed, P is that of Eq. 3, whose logarithm is a mean "
        "over tokens. Then log(1 - P) is close to 0, because P is small, and both ratios are "
        "nearly one loss. So a fall like that of the figure can only come from sums, which are "
        "tried too.",
        "The bases give these replies about -4 before any training, so ending under -4 says "
        "little here. The change from the base says more.",
        ratio,
        ((MAIN, "orpo-1"), (MAIN, "pr-mean"), (MAIN, "pr-sum")),
    ),
    "E5": Experiment(
        "ORPO wins against SFT, DPO and PPO",
        "Tables 2 and 3, Figs. 5 and 11",
        "A reward model prefers the answers of ORPO to those of SFT (69 to 84% of the pairs of "
        "answers) and to those of PPO (66 to 86%). Against DPO it prefers them only with OPT-1.3B "
        "(58 and 71%); with the smaller models it is 42 to 51%.",
        "`orpo-lite compare` on stories260k and pairs of at most "
        f"{answers.SHORT.max_length} tokens. λ is 1, as for OPT in the paper. DPO, SimPO and PPO "
        "start from the adapter of SFT. Three epochs, but one for SFT, and "
        f"{answers.PPO_STEPS} steps for PPO. The last adapter of each arm is measured. DPO, SimPO "
        "and PPO have a tenth of the learning rate of SFT and ORPO, because their losses have no "
        "NLL. PPO has Table 5's loss settings, but batches of 16 prompts instead of 64 and answers "
        f"of {answers.TOKENS} tokens instead of 64 to 256. Two reward models are trained on "
        "disjoint halves of the prompts: the judge, and that of PPO, which is an adapter of the "
        "same base as the arms and sees the pairs of the arms. The latter has a learning rate of "
        f"{answers.REWARD_RATE:g}, the best of four by its loss on the evaluation pairs. Both keep "
        "the adapter with the lowest such loss. A tie counts as half a win. The win rates against "
        "DPO, against SimPO and against SFT with as many epochs are reported and are no part of "
        "the verdict: the paper has no such claim for models of this size, or no such arm. SFT "
        "with as many epochs is added because the paper trains ORPO for up to ten epochs and SFT "
        "for one, so that a win over SFT may only show more training.",
        "A small judge sees style more than content: a win is a difference of its rewards, and "
        "people may prefer the other answer. The intervals do not contain the errors of the "
        "trainings and of the judge. No arm's learning rate was searched: one that loses may need "
        "another. PPO had few steps. The paper's judge has 1.3B parameters, and later tables, such "
        "as that of SimPO (arXiv 2405.14734), have DPO ahead of ORPO.",
        wins,
        is_of_answers=True,
    ),
    "E6": Experiment(
        "Diversity of the answers of ORPO and DPO",
        "Table 4, Section 6.3",
        "The answers of ORPO to one prompt are more alike than those of DPO (higher per-input "
        "diversity PID), and its answers to different prompts are less alike (lower across-input "
        "diversity AID).",
        "PID is the mean cosine of the embeddings of the answers to the same prompt, and AID that "
        "of the first answers to different prompts (Eq. 12 to 15). A high value means little "
        "diversity. The intervals are over prompts; both arms answer the same prompts with the "
        "same random numbers.",
        "The intervals do not contain the error of the trainings. The answers are short, and those "
        "of a story model have little to do with the prompt, so AID measures style more than "
        "content. The paper's Phi-2 and Llama-2 answer prompts of AlpacaEval.",
        diversity,
        is_of_answers=True,
    ),
    "E7": Experiment(
        "Passes through the model",
        "Section 7.3",
        "A step of ORPO needs half the forward passes of a step of DPO, because ORPO has no "
        "reference model.",
        "The count follows from the two losses: the experiment shows that the code does it so. "
        "Rows that go through the model are counted in a step of 16 padded pairs. Times are those "
        "of the packed step, in one process; steps of ORPO and of DPO with its reference pass "
        "alternate on the same pairs.",
        "orpo-lite computes the reference once, before the first step, and keeps it on disk. Then "
        "a step of DPO has as many rows as one of ORPO, and the reference costs one forward pass "
        "of each pair for the whole training. The backward pass is the same in both, so half the "
        "rows is not half the time. The time depends on the machine.",
        passes,
    ),
    "E8": Experiment(
        "The formats of the graders",
        "Tables 1 and 6, Fig. 12",
        "The paper grades answers with AlpacaEval, MT-Bench and IFEval. This is no claim of the "
        "paper: the answers that `orpo-lite generate` writes must be readable by these graders.",
        "A trained run answers real prompts of each grader. Each answer must be read back under "
        "its own prompt, with the fields of the answers that the authors published.",
        "No grader runs here: AlpacaEval and MT-Bench need a model behind an API. The answers of "
        "a small story model would get no score worth reporting.",
        formats,
        ((MAIN, "orpo-1"),),
        first_seed_only=True,
    ),
}
"""Name -> experiment, in the order of the page."""
