"""What the help of each command says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelfuse.cli.drawing import DRAWING
from modelfuse.cli.groups import SHARED


@dataclass(frozen=True, slots=True)
class Page:
    """What a command's help says.

    Attributes:
        usage: How it is called.
        summary: What it does.
        examples: Commands that work.
        own: Its own flags, and what they do.
        takes_settings: Whether it takes a recipe's settings.
        ending: What else there is to know.
    """

    usage: str
    summary: str
    examples: Sequence[str] = ()
    own: Sequence[tuple[str, str]] = ()
    takes_settings: bool = False
    ending: str = ""


PLAIN = (
    "Dashes and underscores are equal. Lists take spaces, commas or brackets: --weight_list 1 2, 1,2 or [1,2]. "
    "Booleans take --rescale, --rescale false and --no_rescale. --model_path_str A,B is --model_path_list A B; "
    "--lora_model_path L is the same with one adapter. A recipe file has the same names; flags override it. "
    "Settings of the machine may be variables, such as MODELFUSE_MEMORY, which override the recipe, too."
)
STATUS = "Exit status: 0 done, 2 the request or an input is wrong, 130 interrupted (143 by SIGTERM), 1 anything else."
MIXTURES = (
    "CONFIG has base_model, whose attention and embeddings are taken, and experts: a list of source_model, "
    "positive_prompts, negative_prompts, noise_scale and residual_scale; also shared_experts, experts_per_token, "
    "dtype, architecture (mixtral, deepseek, qwen2_moe, qwen3_moe) and gate_mode: hidden, hidden_avg and "
    "hidden_last run the base on the prompts (modelfuse[transformers]), cheap_embed takes their embeddings "
    "(modelfuse[tokenizers]), random and uniform_random need training. "
)
#: Options of both commands that extract adapters.
EXTRACTION = (
    ("--max-rank N", "The largest rank. Default: 128."),
    ("--sv-epsilon X", "Drop singular values up to this, so that ranks differ."),
    ("-i, --include-regex R", "Only modules in whose names this is found; may be repeated."),
    ("-e, --exclude-regex R", "No modules in whose names this is found; may be repeated."),
    ("--save-module NAME", "Save modules of this name as they are; may be repeated."),
    ("--[no-]embed-lora", "Embeddings and heads as factors, too. Default: as they are."),
    ("--[no-]distribute-scale", "Half of each singular value in A and B; else all in A."),
    ("--skip-undecomposable", "Leave out what is no matrix: norms and biases."),
)
#: Options of mergekit-yaml that change what comes out, or how.
MERGEKIT = (
    ("--out-shard-size SIZE", "The largest weight file in bytes, with K, M or B behind; 0: one file."),
    ("--random-seed N", "Which random draws. Default: 0."),
    ("--[no-]copy-tokenizer", "Whether the tokenizer comes along where the configuration names none."),
    ("--[no-]safe-serialization", "Whether safetensors are written; else torch's .bin files."),
    ("--[no-]write-model-card", "Whether README.md and mergekit_config.yml are written."),
    ("--unsafe-truncate-embeddings", "Cut embeddings and heads to the smallest number of rows."),
    ("--cuda, --device cuda", "Compute on a GPU, with torch."),
    ("--transformers-cache FOLDER", "Where the hub's library keeps its files."),
    ("-j, --num-threads N", "Parallel workers."),
)

PAGES = {
    "merge": Page(
        "modelfuse merge [recipe.yaml|recipe.json] [--setting value ...]",
        "Merge models into a new folder.",
        (
            "modelfuse merge --model_path_list A B --output_path merged",
            "modelfuse merge --merge_method ties --base_model_path base \\\n"
            "    --model_path_list A B --weight_list 1,0.8 --output_path merged",
            "modelfuse merge recipe.yaml --seed 7",
        ),
        own=(("--html FILE", "Write a page of what it kept of each model, from a sample of the elements."),),
        takes_settings=True,
        ending=f"{PLAIN} {STATUS}",
    ),
    "check": Page(
        "modelfuse check [recipe.yaml|recipe.json] [--setting value ...]",
        "Show the plan of a merge, from the headers alone; nothing is written.",
        ("modelfuse check --merge_method slerp --model_path_list A B",),
        takes_settings=True,
        ending=f"{PLAIN} {STATUS}",
    ),
    "tune": Page(
        "modelfuse tune [recipe.yaml|recipe.json] --evaluate 'COMMAND {model}' [--budget N] [--setting value ...]",
        "Search settings by evaluating merges, and merge with the best.",
        (
            "modelfuse tune recipe.yaml --evaluate 'python eval.py {model}' --budget 40",
            "modelfuse tune recipe.yaml --groups 5 --evaluate perplexity --data texts.jsonl",
        ),
        own=(
            (
                "--evaluate COMMAND",
                "Given a merged folder for {model}, prints one number, the loss, or a JSON object of "
                "several. Or perplexity, of the texts in --data.",
            ),
            ("--data FILE ...", "For perplexity: texts, one a line as JSON; each file gives a number."),
            ("--budget N", "Merges to evaluate in all. Default: 40."),
            ("--groups N", "Weights for N parts of the depth and each model. Default: weights for each model alone."),
            ("--attention_apart", "Weights of their own for attention and MLP of each part."),
            ("--direction WORD ...", "minimize or maximize; NAME=maximize for one of several. Default: minimize."),
            (
                "--sampler NAME",
                "cmaes, tpe, gradient (weights of linear merges, with perplexity) or auto. Default: auto, cmaes for "
                "one number and several settings, else tpe.",
            ),
            ("--jobs N", "Evaluations at a time. Default: 1."),
            (
                "--scratch FOLDER",
                "Where merges stand while they are evaluated. Default: /dev/shm if they fit, else beside the study.",
            ),
        ),
        takes_settings=True,
        ending="What is searched is marked in the recipe, as in weight_list: {tune: [0, 1.5]}, also in rules; without "
        "marks, weights are. The best merge is written to output_path, and the study beside it, in OUTPUT.tune. The "
        f"same command goes on with what was ended. {STATUS}",
    ),
    "mergekit-yaml": Page(
        "modelfuse mergekit-yaml CONFIG OUT [options of mergekit-yaml, flags of merge]",
        "Merge as a configuration of arcee's mergekit says.",
        ("modelfuse mergekit-yaml config.yml merged --random-seed 7",),
        own=MERGEKIT,
        ending=STATUS,
    ),
    "mergekit-multi": Page(
        "modelfuse mergekit-multi CONFIG --out-path OUT [-I FOLDER] [options of mergekit-yaml, flags of merge]",
        "The same of several documents that use each other's results.",
        own=(("-I, --intermediate-dir FOLDER", "Keep the intermediate results there."),),
        ending=STATUS,
    ),
    "mergekit-pytorch": Page(
        "modelfuse mergekit-pytorch CONFIG OUT [options of mergekit-yaml, flags of merge]",
        "The same of weight files alone.",
        own=(
            ("-i, --intersection", "Leave out tensors that only some have."),
            ("-u, --union", "Take those as they are."),
        ),
        ending=STATUS,
    ),
    "moe": Page(
        "modelfuse moe CONFIG --output_path OUT [flags of merge]",
        "Make a mixture of experts of dense models, as a configuration with experts: says.",
        ("modelfuse moe experts.yml --output_path mixture",),
        ending=MIXTURES + STATUS,
    ),
    "mergekit-moe": Page(
        "modelfuse mergekit-moe CONFIG OUT [options of mergekit-yaml, flags of merge]",
        "The same with mergekit-moe's command line.",
        own=(("--i-understand-this-is-not-useful-without-training", "Make experts with equal prompts, too."),),
        ending=STATUS,
    ),
    "warm": Page(
        "modelfuse warm [METHOD ...]",
        "Compile the kernels of these methods, or of all, ahead: for images of containers.",
        ("modelfuse warm linear ties dare_ties",),
        ending="They are kept in the package, else in ~/.cache/modelfuse (XDG_CACHE_HOME), or in "
        "NUMBA_CACHE_DIR/modelfuse. A merge whose kernels were not compiled begins with numpy, to the same bytes. "
        + STATUS,
    ),
    "mergekit-extract-lora": Page(
        "modelfuse mergekit-extract-lora --model M --base-model B --out-path OUT [--max-rank 128]",
        "The difference of two models as a PEFT adapter, with mergekit-extract-lora's command line.",
        own=EXTRACTION,
        ending=STATUS,
    ),
    "extract-lora": Page(
        "modelfuse extract-lora --model M --base_model B --output_path OUT [--max_rank 128] [flags of merge]",
        "The difference of two models as a PEFT adapter: the best factors of each matrix, all else as it is.",
        ("modelfuse extract-lora --model tuned --base_model base --output_path adapter --max_rank 32",),
        own=EXTRACTION,
        ending="It is merge with --output_format lora, --lora_rank and --lora_embeddings whole. " + STATUS,
    ),
    "verify": Page(
        "modelfuse verify FOLDER [--full] [--sample N] [--n_process N] [--seed N] [--hub_endpoint URL]",
        "Check a merged model: every checksum, and a sample merged again from the inputs.",
        ("modelfuse verify merged", "modelfuse verify merged --full"),
        (
            ("--full", "Merge every tensor again and compare; fails where an input is missing."),
            ("--sample N", "Merge N tensors again. Default: as many as read and compare about 256 MB."),
            ("--n_process N", "Parallel workers. Default: one a processor, up to eight."),
            ("--hub_endpoint URL", "Where models on a hub are fetched from, with --full. Default: HF_ENDPOINT."),
            ("--hub_anonymous", "Send no token there, and ask also a hub that only the output names."),
            ("--seed N", "Choose the same sample again. Default: another one each time."),
        ),
        ending="Exit status: 0 if all holds, 2 if anything is wrong.",
    ),
    "inspect": Page(
        "modelfuse inspect MODEL [--merge_prefix PREFIX] [--hub_endpoint URL] [--hub_anonymous]",
        "Show what is in a model, from its headers: modules, layout, ties, tokenizer, and what stands in the way.",
        ("modelfuse inspect models/base", "modelfuse inspect org/model"),
        own=(
            ("--merge_prefix PREFIX", "model or master_weights: which weights of a folder. Default: model."),
            ("--hub_endpoint URL", "Where a model on a hub is. Default: HF_ENDPOINT, else huggingface.co."),
            ("--hub_anonymous", "Send no token there."),
        ),
        ending="MODEL is a folder, a weight file, a URL, or a name on a hub. Numbers of modules that are repeated "
        "are those of all of them together. " + STATUS,
    ),
    "diff": Page(
        "modelfuse diff MODEL MODEL ... [--base MODEL] [--exact] [--html FILE] [--image FILE] [--setting value ...]",
        "Show how models differ from a base and from each other: how far, where, and who may disturb whom.",
        (
            "modelfuse diff models/a models/b --base models/base --html report.html",
            "modelfuse diff models/base models/a",
        ),
        own=(
            ("--base MODEL", "What differences are taken to. Default: the first model."),
            ("--exact", "Interference without sketches: takes much longer, and holds matrices of all models."),
            *DRAWING,
            (f"--{', --'.join(SHARED)}", "As of a merge."),
        ),
        ending=f"MODEL: a folder, file, URL, name on a hub or adapter. docs/diff.md defines every number. {STATUS}",
    ),
    "report": Page(
        "modelfuse report FOLDER [--html FILE] [--image FILE] [--exact]",
        "Show what a merge kept of each model, what was dropped and cancelled, and where.",
        ("modelfuse report merged", "modelfuse report merged --html report.html"),
        own=(
            *DRAWING,
            ("--exact", "Interference without sketches: takes much longer."),
            ("--n_process, --memory", "As of a merge."),
        ),
        ending=f"Its inputs are to be at hand, as they were. docs/pictures.md defines every number. {STATUS}",
    ),
    "push": Page(
        "modelfuse push FOLDER ORG/NAME[@BRANCH] [--public] [--overwrite] [--hub_endpoint URL]",
        "Send a merged model to the Hugging Face Hub, with its model card.",
        ("modelfuse push merged me/merged",),
        own=(
            ("--public", "Let everybody see it. Default: private, if the repository is new."),
            ("--overwrite", "Replace the weights of a repository that has files already."),
            ("--hub_endpoint URL", "Another hub. Default: HF_ENDPOINT, else huggingface.co."),
        ),
        ending="It takes huggingface_hub's token: `hf auth login`, or HF_TOKEN.",
    ),
    "collect": Page(
        "modelfuse collect MODEL --data TEXTS.jsonl --output GRAMS.safetensors [--tokens N] [--device cpu|gpu]",
        "Run a model over a few texts of its task, for --merge_method regmean.",
        (
            "modelfuse collect code --data code.jsonl --output code-grams.safetensors",
            "modelfuse merge --merge_method regmean --base_model_path base --model_path_list code law \\\n"
            "    --gram_list code-grams.safetensors law-grams.safetensors --output_path merged",
        ),
        (
            ("--data FILE", 'Texts: JSON lines such as {"text": …} or {"messages": […]}, or plain text.'),
            ("--output FILE", "The file to write: a Gram matrix of the inputs of every layer, in float32."),
            ("--tokens N", "How many tokens to read, at most a quarter of them of one text. Default: 512."),
            ("--device cpu|gpu", "Where to run the model. Default: cpu."),
            ("--overwrite", "Replace the file."),
        ),
        ending="It takes torch and transformers: pip install 'modelfuse[calibrate]'. " + STATUS,
    ),
    "demo": Page(
        "modelfuse demo [FOLDER]",
        "Make tiny models to try every command on, in a new folder (default: models).",
        ("modelfuse demo",),
    ),
    "methods": Page("modelfuse methods", "Show the methods, their settings, formulas and papers."),
    "completion": Page(
        "modelfuse completion {bash,zsh,tcsh}",
        "Write what makes a shell complete commands, settings and their values.",
        ('eval "$(modelfuse completion bash)"',),
    ),
    "help": Page("modelfuse help [COMMAND]", "Show this, or how to use a command.", ("modelfuse help merge",)),
}
