"""The help of each command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelfuse.cli.drawing import DRAWING
from modelfuse.cli.setting_groups import SHARED


@dataclass(frozen=True, slots=True)
class Page:
    """The help of a command.

    Attributes:
        usage: The usage line.
        summary: A sentence.
        examples: Examples of commands.
        own: Its own flags, with descriptions.
        takes_settings: Whether it accepts all settings of a recipe.
        ending: Further text.
    """

    usage: str
    summary: str
    examples: Sequence[str] = ()
    own: Sequence[tuple[str, str]] = ()
    takes_settings: bool = False
    ending: str = ""


PLAIN = (
    "Dashes and underscores are equivalent. Lists are separated by spaces or commas: --weight_list 1 2, 1,2 or [1,2]. "
    "Booleans are --rescale, --rescale false or --no_rescale. --model_path_str A,B is --model_path_list A B; "
    "--lora_model_path L is the same with one adapter. A recipe file has the same names; flags override it. "
    "Environment variables such as MODELFUSE_MEMORY give settings of the machine, and override the recipe, too."
)
STATUS = "Exit status: 0 done, 2 the request or an input is wrong, 130 interrupted (143 by SIGTERM), 1 anything else."
MIXTURES = (
    "CONFIG has base_model, whose attention and embeddings are used, and experts: a list of source_model, "
    "positive_prompts, negative_prompts, noise_scale and residual_scale; also shared_experts, experts_per_token, "
    "dtype, architecture (mixtral, deepseek, qwen2_moe, qwen3_moe) and gate_mode: hidden, hidden_avg and "
    "hidden_last run the base on the prompts (modelfuse[transformers]), cheap_embed uses their embeddings "
    "(modelfuse[tokenizers]), random and uniform_random require training. "
)
#: Options of the commands that extract adapters.
EXTRACTION = (
    ("--max-rank N", "The largest rank. Default: 128."),
    ("--sv-epsilon X", "Drop singular values up to X, so that ranks differ."),
    ("-i, --include-regex R", "Only modules whose names match R; may be repeated."),
    ("-e, --exclude-regex R", "No modules whose names match R; may be repeated."),
    ("--save-module NAME", "Save modules of this name whole; may be repeated."),
    ("--[no-]embed-lora", "Low-rank factors for embeddings and heads, too. Default: they are saved whole."),
    ("--[no-]distribute-scale", "The square root of each singular value in A and B; else all of it in A."),
    ("--skip-undecomposable", "Leave out tensors that are not matrices: norms and biases."),
)
#: Options of mergekit-yaml that have an effect.
MERGEKIT = (
    ("--out-shard-size SIZE", "The most bytes of a weight file, with the suffix K, M or B; 0: one file."),
    ("--random-seed N", "The seed of random draws. Default: 0."),
    ("--[no-]copy-tokenizer", "Whether to copy the tokenizer if the configuration names none."),
    ("--[no-]safe-serialization", "Whether to write safetensors files; else torch's .bin files."),
    ("--[no-]write-model-card", "Whether to write README.md and mergekit_config.yml."),
    ("--unsafe-truncate-embeddings", "Cut embeddings and heads to the smallest number of rows."),
    ("--cuda, --device cuda", "Compute on a GPU, with torch."),
    ("--transformers-cache FOLDER", "The cache of huggingface_hub."),
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
        own=(("--html FILE", "Write a page with what was kept of each model, from a sample of the elements."),),
        takes_settings=True,
        ending=f"{PLAIN} {STATUS}",
    ),
    "check": Page(
        "modelfuse check [recipe.yaml|recipe.json] [--setting value ...]",
        "Show the plan of a merge, from the headers only; nothing is written.",
        ("modelfuse check --merge_method slerp --model_path_list A B",),
        takes_settings=True,
        ending=f"{PLAIN} {STATUS}",
    ),
    "tune": Page(
        "modelfuse tune [recipe.yaml|recipe.json] --evaluate 'COMMAND {model}' [--budget N] [--setting value ...]",
        "Search settings by evaluating merges, and write the best merge.",
        (
            "modelfuse tune recipe.yaml --evaluate 'python eval.py {model}' --budget 40",
            "modelfuse tune recipe.yaml --groups 5 --evaluate perplexity --data texts.jsonl",
        ),
        own=(
            (
                "--evaluate COMMAND",
                "A command with the merged folder as {model}; prints one number, the loss, or a JSON object of "
                "several numbers. Or perplexity, of the texts in --data.",
            ),
            ("--data FILE ...", "For perplexity: texts as JSON lines; each file gives a number."),
            ("--budget N", "Merges to evaluate in all. Default: 40."),
            ("--groups N", "Separate weights for N groups of layers. Default: one weight per model."),
            ("--attention_apart", "Separate weights for attention and MLP of each group."),
            ("--direction WORD ...", "minimize or maximize; NAME=maximize for one of several. Default: minimize."),
            (
                "--sampler NAME",
                "cmaes, tpe, gradient (weights of linear merges, with perplexity) or auto. Default: auto, cmaes for "
                "one number and several settings, else tpe.",
            ),
            ("--jobs N", "Concurrent evaluations. Default: 1."),
            (
                "--scratch FOLDER",
                "The folder of merges while they are evaluated. Default: /dev/shm if they fit, else beside the study.",
            ),
        ),
        takes_settings=True,
        ending="Mark the settings to search in the recipe, as in weight_list: {tune: [0, 1.5]}, also in rules; without "
        "marks, the weights are searched. The best merge is written to output_path, and the study beside it, to "
        f"OUTPUT.tune. The same command resumes an interrupted search. {STATUS}",
    ),
    "mergekit-yaml": Page(
        "modelfuse mergekit-yaml CONFIG OUT [options of mergekit-yaml, flags of merge]",
        "Run a configuration of arcee's mergekit.",
        ("modelfuse mergekit-yaml config.yml merged --random-seed 7",),
        own=MERGEKIT,
        ending=STATUS,
    ),
    "mergekit-multi": Page(
        "modelfuse mergekit-multi CONFIG --out-path OUT [-I FOLDER] [options of mergekit-yaml, flags of merge]",
        "Run a mergekit configuration of several documents that use each other's results.",
        own=(("-I, --intermediate-dir FOLDER", "Write the intermediate results to this folder."),),
        ending=STATUS,
    ),
    "mergekit-pytorch": Page(
        "modelfuse mergekit-pytorch CONFIG OUT [options of mergekit-yaml, flags of merge]",
        "Run a mergekit configuration of weight files.",
        own=(
            ("-i, --intersection", "Leave out tensors that only some models have."),
            ("-u, --union", "Copy tensors that only some models have."),
        ),
        ending=STATUS,
    ),
    "moe": Page(
        "modelfuse moe CONFIG --output_path OUT [flags of merge]",
        "Make a mixture of experts from dense models, by a configuration with the key experts.",
        ("modelfuse moe experts.yml --output_path mixture",),
        ending=MIXTURES + STATUS,
    ),
    "mergekit-moe": Page(
        "modelfuse mergekit-moe CONFIG OUT [options of mergekit-yaml, flags of merge]",
        "Make a mixture of experts, with mergekit-moe's command line.",
        own=(("--i-understand-this-is-not-useful-without-training", "Allow experts with the same prompts."),),
        ending=STATUS,
    ),
    "warm": Page(
        "modelfuse warm [METHOD ...]",
        "Compile the kernels of these methods, or of all, in advance, such as for container images.",
        ("modelfuse warm linear ties dare_ties",),
        ending="They are stored in the package, else in ~/.cache/modelfuse (XDG_CACHE_HOME), or in "
        "NUMBA_CACHE_DIR/modelfuse. A merge whose kernels are not compiled starts with numpy, with the same bytes. "
        + STATUS,
    ),
    "mergekit-extract-lora": Page(
        "modelfuse mergekit-extract-lora --model M --base-model B --out-path OUT [--max-rank 128]",
        "Extract the difference of two models as a PEFT adapter, with mergekit-extract-lora's command line.",
        own=EXTRACTION,
        ending=STATUS,
    ),
    "extract-lora": Page(
        "modelfuse extract-lora --model M --base_model B --output_path OUT [--max_rank 128] [flags of merge]",
        "Extract the difference of two models as a PEFT adapter: the best low-rank factors of each matrix.",
        ("modelfuse extract-lora --model tuned --base_model base --output_path adapter --max_rank 32",),
        own=EXTRACTION,
        ending="Other changed tensors are saved whole. It is the same as merge with --output_format lora, --lora_rank "
        "and --lora_embeddings whole. " + STATUS,
    ),
    "verify": Page(
        "modelfuse verify FOLDER [--full] [--sample N] [--n_process N] [--seed N] [--hub_endpoint URL]",
        "Check a merged model: all checksums, and a sample of tensors merged again from the inputs.",
        ("modelfuse verify merged", "modelfuse verify merged --full"),
        (
            ("--full", "Merge every tensor again and compare; a missing input is a problem."),
            ("--sample N", "Merge N tensors again. Default: about 256 MB."),
            ("--n_process N", "Parallel workers. Default: one per processor, up to eight."),
            ("--hub_endpoint URL", "Where models on a hub are fetched from, with --full. Default: HF_ENDPOINT."),
            ("--hub_anonymous", "Send no token, and also fetch from a hub that only the output's files name."),
            ("--seed N", "The seed of the sample. Default: random."),
        ),
        ending="Exit status: 0 without problems, 2 with problems.",
    ),
    "inspect": Page(
        "modelfuse inspect MODEL [--merge_prefix PREFIX] [--hub_endpoint URL] [--hub_anonymous]",
        "Show the content of a model, from its headers: modules, layout, ties, tokenizer, and obstacles to a merge.",
        ("modelfuse inspect models/base", "modelfuse inspect org/model"),
        own=(
            ("--merge_prefix PREFIX", "model or master_weights: which weights of a folder. Default: model."),
            ("--hub_endpoint URL", "The hub. Default: HF_ENDPOINT, else huggingface.co."),
            ("--hub_anonymous", "Send no token."),
        ),
        ending="MODEL is a folder, a weight file, a URL, or a hub name. Numbers of repeated modules are their totals. "
        + STATUS,
    ),
    "diff": Page(
        "modelfuse diff MODEL MODEL ... [--base MODEL] [--exact] [--html FILE] [--image FILE] [--setting value ...]",
        "Show how models differ from a base and from each other: how much, where, and which may interfere.",
        (
            "modelfuse diff models/a models/b --base models/base --html report.html",
            "modelfuse diff models/base models/a",
        ),
        own=(
            ("--base MODEL", "The model that differences are taken to. Default: the first model."),
            ("--exact", "Compute interference without sketches: much slower, and needs memory for whole matrices."),
            *DRAWING,
            (f"--{', --'.join(SHARED)}", "As for a merge."),
        ),
        ending=f"MODEL: a folder, file, URL, hub name or adapter. docs/diff.md defines every number. {STATUS}",
    ),
    "report": Page(
        "modelfuse report FOLDER [--html FILE] [--image FILE] [--exact]",
        "Show what a merge kept of each model, what it dropped or cancelled, and where.",
        ("modelfuse report merged", "modelfuse report merged --html report.html"),
        own=(
            *DRAWING,
            ("--exact", "Compute interference without sketches: much slower."),
            ("--n_process, --memory", "As for a merge."),
        ),
        ending=f"The inputs must be available and unchanged. docs/pictures.md defines every number. {STATUS}",
    ),
    "push": Page(
        "modelfuse push FOLDER ORG/NAME[@BRANCH] [--public] [--overwrite] [--hub_endpoint URL]",
        "Upload a merged model to the Hugging Face Hub, with its model card.",
        ("modelfuse push merged me/merged",),
        own=(
            ("--public", "Make a new repository public. Default: private."),
            ("--overwrite", "Replace the weights of a repository that already has files."),
            ("--hub_endpoint URL", "Another hub. Default: HF_ENDPOINT, else huggingface.co."),
        ),
        ending="It uses huggingface_hub's token: `hf auth login`, or HF_TOKEN.",
    ),
    "collect": Page(
        "modelfuse collect MODEL --data TEXTS.jsonl --output GRAMS.safetensors [--tokens N] [--device cpu|gpu]",
        "Run a model over some texts of its task, to collect Gram matrices for --merge_method regmean.",
        (
            "modelfuse collect code --data code.jsonl --output code-grams.safetensors",
            "modelfuse merge --merge_method regmean --base_model_path base --model_path_list code law \\\n"
            "    --gram_list code-grams.safetensors law-grams.safetensors --output_path merged",
        ),
        (
            ("--data FILE", 'Texts: JSON lines such as {"text": …} or {"messages": […]}, or plain text.'),
            ("--output FILE", "The file to write: a Gram matrix of the inputs of every layer, in float32."),
            ("--tokens N", "The number of tokens to read, at most a quarter of them from one text. Default: 512."),
            ("--device cpu|gpu", "Where to run the model. Default: cpu."),
            (
                "--memory SIZE",
                "The most memory for Gram matrices, beside the model's; the texts are read again for each part of the "
                "layers that fits. Default: 8GB.",
            ),
            ("--overwrite", "Replace the file."),
        ),
        ending="It needs torch and transformers: pip install 'modelfuse[calibrate]'. " + STATUS,
    ),
    "demo": Page(
        "modelfuse demo [FOLDER]",
        "Write tiny models for trying commands to a new folder (default: models).",
        ("modelfuse demo",),
    ),
    "methods": Page("modelfuse methods", "Show the methods, their settings, formulas and papers."),
    "completion": Page(
        "modelfuse completion {bash,zsh,tcsh}",
        "Print a script for shell completion of commands, settings and their values.",
        ('eval "$(modelfuse completion bash)"',),
    ),
    "help": Page("modelfuse help [COMMAND]", "List the commands, or show the help of one.", ("modelfuse help merge",)),
}
