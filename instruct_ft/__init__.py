"""Instruction fine-tuning of pretrained language models: a Jupyter course and the library that it writes"""

from importlib import import_module

__version__ = "0.1.0"

# Public names by module. They are imported on first use (PEP 562), so `import instruct_ft` loads none of them.
_MODULES = {
    "settings": "InputError Settings load_settings repo_root results_dir set_seed",
    "claims": "Claim ClaimError claim claims_table read_claims",
    "atlas.facts": "atlas_path",
    "atlas.instructions": "instructions",
    "atlas.tasks": "task_rows",
    "atlas.tokenizers": "family_tokenizer new_tokenizer",
    "data.collect": "StepResult accounting collect steps write_rows",
    "data.clean": "apply_rules clean drop_duplicate_ids drop_empty drop_exact_duplicates"
    " drop_near_duplicates handle_missing missing_values near_duplicate_pairs normalise rule_counts",
    "data.label": "cast_votes class_widget cohen_kappa fleiss_kappa krippendorff_alpha label_errors"
    " out_of_fold prelabel span_widget spans_to_tags tags_to_spans weighted_vote",
    "data.split": "Splits contamination folds split",
    "data.convert": "convert detect_format from_instructions from_messages to_instructions"
    " to_messages unify",
    "data.load": "Loader Mixture Pad Stack StreamLoader fingerprint mix padding_share",
    "data.augment": "Augmented Counterfactual EntitySwap Synonym augment",
    "data.preprocess": "Aligned language normal preprocess sentences terms words",
    "tokenization.choose": "Comparison Measures ModelSize Parity compare_tokenizers model_size"
    " renyi_efficiency",
    "tokenization.encode": "TEMPLATES Encoded encode encode_prompt encode_rows resolve_template"
    " show_tokens stop_ids",
    "tokenization.entities": "align_labels align_rows keep_whole labels_to_spans read_tokens"
    " show_labels split_scripts stitch token_offsets whole_names windows",
    "tokenization.special_tokens": "INITS add_tokens disagreements lora_rows save_pair"
    " train_only_rows",
    "tokenization.characters": "explain_loss normalise_text show_side_by_side survey with_policies",
    "tokenization.oov": "KnownWords add_byte_fallback bpe_from_scratch coverage draw_merges"
    " embedding_neighbours extend_vocabulary nearest_word train_tokenizer_like worth_adding",
    "tokenization.inspect": "audit diff_tokenizers",
    "model.choose": "compare_architectures family_of",
    "model.load": "load_model model_card pick_device training_memory",
    "model.surgery": "add_layers angular_distance keep_layers pick_layers replace_vocabulary"
    " resize_positions set_dropout widen",
    "model.crf": "CRFTagger LinearChainCRF bio_constraints",
    "model.adapters": "add_adapter add_lora load_adapter logits_by_row lora_plus_groups merge_adapter"
    " save_adapter use_adapter",
    "training.trainer": "InstructTrainer Run collate fine_tune",
    "eval.generate": "Answer generate stream",
    "eval.metrics": "exact_match score_rows wilson",
    "eval.report": "write_report",
    "pipeline": "run",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = ["__version__", *_HOME]  # noqa: PLE0604 - the names are strings


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
