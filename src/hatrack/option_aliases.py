"""Names that other tools have for the options of a recipe, for suggestions."""

_ALIASES = {
    "base": "model model_name model_id model_path model_name_or_path base_model base_model_name_or_path "
    "pretrained_model_name_or_path checkpoint",
    "data": "dataset dataset_name dataset_path data_path data_files train_file train_data training_data train_dataset "
    "training_file train",
    "eval_data": "eval_file eval_dataset validation_file validation_data validation_dataset val_data valid_data "
    "test_data test_file validation val_file",
    "text": "text_column text_field dataset_text_field input_column",
    "label": "labels label_column target label_field",
    "prompt": "prompt_column instruction question",
    "completion": "completion_column response answer response_column",
    "messages": "messages_column conversations",
    "max_length": "max_seq_length max_seq_len max_len seq_len sequence_len sequence_length cutoff_len block_size "
    "model_max_length context_length max_tokens",
    "r": "rank lora_r lora_rank lora_dim",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules lora_target lora_targets lora_target_modules",
    "layers": "num_layers lora_layers layers_to_transform",
    "variant dora": "use_dora",
    "variant rslora": "use_rslora",
    "variant pissa": "init_lora_weights",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs epoch",
    "steps": "max_steps num_steps total_steps train_steps iters iterations max_iters",
    "lr": "learning_rate peak_lr base_lr",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size per_gpu_train_batch_size "
    "global_batch_size batch bs",
    "seed": "random_seed random_state data_seed",
    "dtype": "torch_dtype model_dtype precision",
    "dtype bfloat16": "bf16",
    "dtype float16": "fp16",
    "quantize": "quantization bits quantization_bit quantisation",
    "quantize 4bit": "load_in_4bit qlora",
    "quantize 8bit": "load_in_8bit",
    "output": "output_dir out_dir out save_dir save_path output_path adapter_path",
    "name": "run_name adapter_name",
    "resume": "resume_from_checkpoint",
    "report_to": "logger tracker log_with",
}
OTHER_NAMES = {other: option for option, others in _ALIASES.items() for other in others.split()}
"""Another tool's name for an option -> the option, with its value if the name implies one."""

NOT_NEEDED = {
    "gradient_accumulation_steps": "--batch-size counts the rows of a whole step, however few fit at a time",
    "gradient_checkpointing": "hatrack uses it if memory is short",
    "per_device_eval_batch_size": "hatrack derives it",
    "eval_batch_size": "hatrack derives it",
    "warmup_steps": "hatrack warms the learning rate up by itself",
    "warmup_ratio": "hatrack warms the learning rate up by itself",
    "warmup": "hatrack warms the learning rate up by itself",
    "lr_scheduler_type": "the learning rate decays linearly",
    "lr_scheduler": "the learning rate decays linearly",
    "weight_decay": "hatrack trains without weight decay",
    "optim": "hatrack trains with AdamW",
    "optimizer": "hatrack trains with AdamW",
    "num_labels": "the classes are those of the data",
    "num_classes": "the classes are those of the data",
    "modules_to_save": "hatrack derives it from the task",
    "task_type": "hatrack derives it from --task or the columns of the data",
    "packing": "hatrack batches rows of similar length",
    "tokenizer": "hatrack uses the base's",
    "tokenizer_name": "hatrack uses the base's",
    "eval_steps": "hatrack scores after each epoch",
    "save_steps": "hatrack saves after each epoch, and when it is stopped",
    "logging_steps": "metrics.jsonl has the losses",
    "use_cuda": "use --device",
    "no_cuda": "use --device",
    "bias": "hatrack trains no biases",
    "lora_bias": "hatrack trains no biases",
}
"""Options of other tools that hatrack does not have, and why."""
