"""Messages with advice that no case follows: why, and which tests follow it. Prefer a case."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Left:
    """messages: as ``templates`` finds them. tests: under tests/, that follow the advice where the situation is made."""

    reason: str
    tests: tuple[str, ...]
    messages: tuple[str, ...]


NO_MESSAGE = "no message: help, a title, a note of a state, or a part of another text"
NOT_FOLLOWED: tuple[Left, ...] = (
    Left(
        "several processes: a launcher starts them",
        (
            "e2e/test_ranks.py::test_a_killed_process_ends_the_others_and_the_job_goes_on",
            "e2e/test_ranks.py::test_another_number_of_processes_is_refused_unless_allowed",
            "e2e/test_ranks.py::test_jobs_that_processes_do_not_share_are_refused",
            "e2e/test_eval_ranks.py::test_batches_that_do_not_suffice_and_the_advice",
            "cli/test_cli.py::test_commands_that_processes_do_not_share",
            "machine/test_places.py::test_a_place_that_makes_no_sense_is_refused",
            "sched/test_together.py::test_ranks_with_other_options_are_refused_by_all",
            "sched/test_together.py::test_folders_of_hidden_states",
        ),
        (
            "run the same command again",
            "{}={}, {}={}: there is no such process; start bigq by torchrun or srun",
            "MASTER_ADDR: is not set, so ranks cannot find each other; start bigq by torchrun, or with srun export the first node's name "
            "as MASTER_ADDR and a free port as MASTER_PORT",
            "{}={}: not a number, though {} is set; start bigq by torchrun or srun, or unset {}",
            "rank {}: the device is out of memory with --batch {}; several processes do not halve it by themselves: run the same command "
            "with --batch {}",
            "--samples {}: {} processes share the calibration rows, and each needs at least one; give at least {}, or start fewer "
            "processes",
            "the job in {} was begun with {} process{}, now there {}: what is quantized from here on would have other bytes; start it "
            "with {}, or add --allow-ranks",
            "{}: {} processes cannot share such a job; start it in one process",
            "bigq {}: {} processes cannot share it; start it in one process",
            "--data {}: {} processes share its rows, and each needs at least one, but there {} of {} tokens; start at most {}, or give "
            "more --samples or more text",
            "--batch {}: {} processes share the batches, but {} rows are only {}; give --batch {} or less, or start fewer processes",
            "rank {} of {}: its {} differ from those of rank 0; start all processes with the same command, and with the same model, text "
            "and versions on each host",
            "rank {}: {}: cannot be made: {}; OUT must be on a file system that all hosts share, at the same path, and every process must "
            "be allowed to write there",
        ),
    ),
    Left(
        "no format of today refuses all numbers of bits but for shapes that it refuses before",
        ("mixed/test_mixed_choice.py::test_a_group_has_the_bits_that_fit_all_of_its_parts",),
        ("--bits-per-weight: no number of bits fits {}; leave it unquantized with --skip",),
    ),
    Left(
        "a damaged checkpoint or config; the one that is fetched again is that of the test before it is damaged",
        ("e2e/test_coded_sources.py::test_a_damaged_checkpoint_is_refused_and_the_original_is_not",),
        (
            "{}: tensor {} has shape {} instead of {}; fetch the model again",
            "{}: tensor {} lacks its scales, {}; fetch it again",
            "{}: tensor {} has shape {}, not one number; fetch it again",
            "{}: quantization_config: weight_block_size is {}, not two sizes; fetch it again",
            "tensor {}: its shape or dtype does not match those of qzeros and scales; the checkpoint is damaged, or its version of AWQ is "
            "not gemm: fetch it again, or one of version gemm",
        ),
    ),
    Left(
        "a damaged tensor, or one of another kind; the format reads the one that it was made from",
        (
            "io/formats/test_bitsandbytes_format.py::test_damaged_tensors_are_refused",
            "io/formats/test_bitsandbytes_format.py::test_values_that_no_reader_can_use_are_found",
        ),
        (
            "tensor {}: is not a description of a matrix by bitsandbytes; fetch it again",
            "tensor {}.weight.quant_map: holds other points than those of {}; fetch it again",
            "tensor {}: block sizes and type {}; of bitsandbytes, bigq reads blocks of {} with nested blocks of {}: give such a "
            "checkpoint, or the original model",
            "tensor {}: its blocks cross rows, which bigq does not read; give the original model",
        ),
    ),
    Left(
        "scales that no conversion of today brings to the format",
        ("io/formats/test_bitsandbytes_format.py::test_only_scales_that_nested_ones_can_hold_are_stored",),
        ("{}: its scales cannot be stored exactly in {}; quantize the original model with --format {}",),
    ),
    Left(
        "a damaged checkpoint; the one that is fetched again is that of the test before it is damaged",
        (
            "e2e/test_joined_parameters.py::test_a_missing_piece_is_named",
            "e2e/test_joined_parameters.py::test_pieces_that_do_not_fit_are_refused",
        ),
        (
            "{}: the checkpoint holds {} of the {} tensors that it consists of, such as {}; fetch it again",
            "{}: tensor {} is {} {}, which cannot be joined to {}, {} {}; fetch the checkpoint again",
        ),
    ),
    Left(
        "a checkpoint that no program is known to write; the original model is not made from it",
        ("e2e/test_static_inputs.py::test_experts",),
        ("{}: has numbers for the inputs of experts (static scales), which bigq cannot read; give the original model",),
    ),
    Left(
        "names of modules that no family of transformers has today",
        ("e2e/test_awq.py::test_names_that_readers_confuse_are_refused",),
        (
            "use --format {}",
            "{} is not packed, and readers of {} find its name in {}, which is; keep the model in its present format",
        ),
    ),
    Left(
        "about the original model, which a packed one is not made from here; or about zero points, with other words than an option's",
        ("e2e/test_w8a8.py::test_other_formats_are_other_models", "e2e/test_w8a8.py::test_what_does_not_fit_is_refused"),
        (
            "{}: readers of {} quantize the inputs of Linears too, so another format is another model; quantize the original model with "
            "--format {}",
            "{}: readers quantize the inputs of a {}, which bigq cannot; give the original model",
            "{}: its scales are not exact in {}; quantize the original model with --scale-bits 8",
        ),
    ),
    Left(
        "about weights that models do not have, or scales that no job writes",
        ("e2e/test_float_formats.py::test_weights_above_what_scales_hold_name_the_linear",),
        (
            "{}: its weights need a scale above {}, the largest one of the format; leave this Linear unquantized with --skip",
            "{}: its scales are not exact in {}; quantize the original model with --format {}",
        ),
    ),
    Left(
        "another version of AWQ",
        ("e2e/test_coded_sources.py::test_another_version_of_awq_is_refused",),
        (
            "{}: is already quantized (awq, version {}, {} bits); of awq, bigq reads version gemm at 4 bits: give such a one, or the "
            "original model",
        ),
    ),
    Left(
        "a device that computes wrong products, which a test replaces by a wrong rotation",
        ("model/test_rotated_weights.py::test_wrong_products_are_noticed",),
        ("{}: its rotated weight gives other products than it must, by {} of their norm; check the device, or leave out --rotate",),
    ),
    Left(
        "about config.json, with two ways out",
        ("e2e/test_other_models.py::test_a_method_that_no_weight_is_stored_by",),
        (
            "{}: says that weights are quantized ({}), but none is stored so; fetch the checkpoint again, or remove quantization_config if "
            "the weights are the original ones",
        ),
    ),
    Left(
        "a note about a reader in a plan, and no error",
        ("io/formats/test_readers.py::test_asymmetric_experts_become_symmetric_ones",),
        ("asymmetric experts of {} bits in {}; use --sym", "asymmetric {} of {} models; use --sym"),
    ),
    Left(
        "a warning, whose advice is about config.json",
        ("e2e/test_extras.py::test_a_tied_head_with_other_values_is_used_and_named",),
        (
            "config.json ties the output head to the input embedding (tie_word_embeddings), but the checkpoint holds another head: bigq "
            "and transformers use it, vLLM does not; set tie_word_embeddings to false in config.json, or remove the head's tensor",
        ),
    ),
    Left(
        "no published model: an expert that differs from one of few units",
        ("e2e/test_fold.py::test_a_wrong_fold_inside_experts_is_refused",),
        ("{}: an expert does not compute the same once scales are folded into it, although one of few units does; use --fold none",),
    ),
    Left(
        NO_MESSAGE,
        (),
        (
            "quantize a model, or resume a job that was stopped",
            "check a job's output folder against its records",
            "write a job's report as one HTML file, or as a model card",
            "quantize the models of a file of jobs one after another, or resume them",
            "YAML file with options by name, model and out; options of the command line take their place",
            "quantize the tiny model that ships with bigq and compare the results",
            "write OUT/README.md, a model card for the hub, in place of the source's README; no HTML unless --out is given too",
            "leave Linears whose name matches unquantized; may be repeated",
            "tensor {}.{} is packed as {}; the model and config.json make it {}",
            "tensor {} is packed as {}; the model and the job make it {}",
            "write {} … {}",
            "copy to device",
            "warning: {}; the end of this run is not recorded, but the output is complete",
            "block {}: the outputs of {} calibration tokens are not finite; later blocks leave them out",
        ),
    ),
    Left(
        "the process ends, which a case cannot do",
        (
            "e2e/test_resume.py::test_interrupt_on_the_command_line",
            "e2e/test_signals.py::test_asked_to_stop_in_the_middle_of_a_block",
            "e2e/test_signals.py::test_a_second_interrupt_ends_it_at_once",
            "e2e/test_signals.py::test_a_step_that_outlasts_the_grace_is_given_up",
            "inspect/test_status.py::test_a_job_from_its_beginning_over_its_death_to_its_end",
            "inspect/test_status.py::test_a_job_that_was_asked_to_stop_says_so",
            "inspect/test_status.py::test_a_job_that_failed_says_why",
            "batch/test_run.py::test_asked_to_stop_before_the_first_job",
            "sched/test_short_runs.py::test_the_third_run_in_a_row_that_finishes_nothing_ends_with_an_error",
        ),
        (
            "run the same command again to resume",
            "{}: stopping after this step, within {} s; press Ctrl-C to stop at once",
            "it was asked to stop; run the same command again to resume it",
            "it ended with an error; fix that and run the same command again to resume it",
            "its process was killed; run the same command again to resume it",
            "{}: stopped before the first job; run the same command again",
            "{}: the last {} runs ended before they finished a unit; the job needs {}: run the same command in a longer slot",
        ),
    ),
    Left(
        "a server runs until it is stopped",
        ("live/test_live.py::test_a_port_in_use",),
        ("--port {}: cannot be listened on ({}); name another port, or 0 for any that is free",),
    ),
    Left(
        "another process or machine holds the folder",
        (
            "job/test_owner.py::test_a_second_process_is_refused_and_told_by_whom",
            "job/test_owner.py::test_a_holder_elsewhere_whose_heartbeat_goes_on_is_let_be",
            "job/test_owner.py::test_stealing_from_elsewhere_does_not_wait",
            "job/test_owner.py::test_a_lock_that_cannot_be_removed_is_reported",
            "job/test_owner.py::test_a_lock_that_keeps_being_replaced_is_reported",
            "inspect/test_status.py::test_a_holder_on_another_machine",
        ),
        (
            "wait for it or stop it",
            ", or use --steal-lock if you know that it is dead",
            "it may be running on another machine or in another container; check again whether its heartbeat advances",
            "{}: keeps being replaced, probably by another job; stop that job, or choose another folder",
            "{}: cannot be removed: {}; remove it, or choose another folder",
        ),
    ),
    Left(
        "files change or fail in the middle of a job",
        (
            "e2e/test_resume.py::test_source_that_changes_during_the_job",
            "e2e/test_faults.py::test_source_that_cannot_be_read",
            "e2e/test_faults.py::test_own_file_that_cannot_be_read",
            "e2e/test_faults.py::test_system_refuses",
        ),
        (
            "{}: changed or replaced while the job was running; committed shards are valid, but the source is no longer the"
            " same model: restore the original files and run the same command again",
            "{}: cannot be read: {}; check the disk and run the command again",
            "{}: cannot be read: {}; check that the file still exists",
            "{}: cannot be read: {}; check the disk and run the command again, or remove the file to have it made again",
            "{}: cannot be read: {}; check the disk, then run the same command again",
            "{}: cannot be listed: {}; check the disk, then run the same command again",
            "{}: stat failed: {}; check the disk, then run the same command again",
            "{}: the activations file was truncated, perhaps by another program; run the command again",
        ),
    ),
    Left(
        "needs memory that ends, or a GPU",
        (
            "e2e/test_out_of_memory.py::test_one_row_that_does_not_fit_is_an_error",
            "e2e/test_generate.py::test_a_packed_model_takes_less_than_a_dense_one",
        ),
        (
            "use --device cpu, or ",
            "cannot pin {} bytes of host memory for prefetch ({}); use a smaller --read-ahead",
            "{}: out of memory ({}); use fewer --samples, a shorter --seqlen or --activations host",
            "the host is out of memory; use fewer --samples or a smaller --batch",
        ),
    ),
    Left(
        "needs the hub",
        (
            "e2e/test_hub.py::test_quantize_from_the_hub_and_again_offline",
            "e2e/test_hub.py::test_a_plan_for_what_the_hub_does_not_have",
            "e2e/test_hub.py::test_an_adapter_and_two_models_on_the_hub",
            "e2e/test_hub.py::test_unknown_repository_and_unknown_revision",
        ),
        (
            "{}: has no safetensors shards; convert it to safetensors first",
            "{}: fetching it from the hub failed: {}; run the same command again",
            "{}: the hub sent malformed data ({}); try again later",
            "disk: {} more needed in {}, for {} of MODEL (set HF_HOME to use another cache, or give --fetch stream)",
            "{}: holds {} beside {}, which names other files ({}); transformers loads the single file, bigq the shards: download the one "
            "that is your model into a folder, and give that",
        ),
    ),
    Left(
        "a hub that refuses, fails or holds something else; the tests have one, and then let it recover",
        (
            "e2e/test_push_refused.py::test_a_repository_that_may_not_be_written_to",
            "e2e/test_push_refused.py::test_a_repository_with_files_of_others",
            "e2e/test_push_refused.py::test_the_source_is_no_place_for_the_output",
            "e2e/test_push.py::test_a_job_that_begins_to_upload_later",
            "e2e/test_push.py::test_a_card_that_the_hub_refuses",
            "e2e/test_push.py::test_a_hub_that_stays_silent",
            "e2e/test_push.py::test_other_bytes_than_were_sent",
            "e2e/test_push.py::test_a_hub_without_large_files",
            "e2e/test_push.py::test_a_folder_that_lets_nothing_be_removed",
            "e2e/test_push.py::test_a_disk_that_fails_while_it_uploads",
            "e2e/test_push_refused.py::test_offline",
            "io/remote/test_push_repository.py::test_answers_that_no_other_try_changes",
            "io/remote/test_push_repository.py::test_a_file_that_is_gone",
        ),
        (
            "--push {}: the hub does not let you write there ({}); log in with 'hf auth login' and a token that may write, or name a "
            "repository of yours",
            "--push {}: holds {}{}, which the job in {} has not uploaded; name a new repository, or empty this one",
            "--push {}: is the repository that MODEL is read from; name another one",
            "--push {}: shards of the job in {} are in {} only; give --push {}, or choose another folder",
            "--push {}: the hub refuses the metadata at the top of README.md ({}); correct MODEL's README.md and remove OUT's, then run "
            "the same command again",
            "{}: the hub does not take it: {}, for {} s; the job can go on later: run the same command again",
            "{}/{}: after its upload, the hub does not hold the bytes of {}; run the same command again",
            "{}/{}: the hub keeps it in git itself and not as a large file, so it does not say its hash; add '*.safetensors filter=lfs "
            "diff=lfs merge=lfs -text' to the repository's .gitattributes, and remove the file there",
            "{}: cannot be removed: {}; check the folder's permissions, then run the same command again",
            "{}: uploading failed: {}; run the same command again",
            "{}: cannot be read for its upload: {}; run the same command again",
            "--push {}: HF_HUB_OFFLINE forbids asking the hub; unset it, or leave out --push",
            "--push {}: is not a repository's name; give --push owner/name",
            "--push {}: the hub answered with status {}: {}; check the repository",
            "--push {}: the hub's client refuses it: {}; check the repository",
        ),
    ),
    Left(
        "needs a server",
        (
            "io/remote/test_http.py::test_files_that_are_missing_or_changed_are_errors_at_once",
            "io/remote/test_http.py::test_a_server_without_ranges_is_refused",
            "io/remote/test_http.py::test_statuses_that_no_patience_helps",
            "io/remote/test_http.py::test_no_server_is_an_error_after_the_patience",
            "io/remote/test_http.py::test_offline_is_an_error_at_once",
            "io/remote/test_http.py::test_file_systems_of_fsspec",
            "io/remote/test_http.py::test_small_files_that_are_gone_are_removed_here_too",
            "io/remote/test_parts.py::test_a_disk_that_is_full_is_an_error_of_the_cache",
            "e2e/test_streaming.py::test_the_plan_of_a_url",
            "e2e/test_streaming.py::test_only_quantize_and_plan_take_urls",
        ),
        (
            "{}: only bigq quantize and bigq plan read a model from a URL; download it into a folder, and give that",
            "--fetch download: MODEL is a URL, which is always streamed; leave out --fetch",
            "{}: HF_HUB_OFFLINE forbids requests to servers; unset it, or download the model first",
            "{}: the server does not send parts of files, which streaming needs; download the model first",
            "{}: changed while it was read; the source is no longer the same model: begin the job again with it",
            "{}: the server answered with status {}; check the address and your login",
            "{}: the hub answered with status {}; check the name and your login",
            "{}: the hub does not say its size and version; use --fetch download",
            "{}: the server has no such file; check the address",
            "{}: its index names it, but the repository lacks it; use another revision",
            "{}: is not in the repository any more; use another revision of it",
            "{}: has more than {} bytes; remove it, or give a folder without it",
            "{}: is not there; check the address",
            "{}: access is denied ({}); check your credentials",
            "{}: gave {} of {} bytes; check the disk, then run the same command again",
            "{}: cannot be written: {}; {}, or make the cache smaller with --fetch-cache",
            "{}: cannot be fetched: {}, for {} s; check the network, then run the same command again",
            "{}: missing; MODEL must be the URL of a folder with config.json and shards",
        ),
    ),
    Left(
        "no method of bigq is so",
        ("methods/test_methods.py::test_a_format_that_a_method_cannot_fill_is_refused",),
        ("--format {}: {} writes {}; use --format {}",),
    ),
    Left(
        "a checkpoint with experts",
        (
            "e2e/test_experts_end_to_end.py::test_settings_that_readers_do_not_see_are_those_of_the_whole_bank",
            "e2e/test_experts_end_to_end.py::test_missing_matrices_of_experts",
        ),
        (
            "--rule and --skip must treat all matrices of all experts in a bank alike, since readers take it as a whole: {} differs from "
            "{}; use a pattern such as {}.*",
            "the checkpoint holds {} tensors like {}, but {} of another matrix of the same experts; fetch it again",
        ),
    ),
    Left(
        "a warning about files of megabytes",
        ("e2e/test_side_files.py::test_limits_in_subfolders",),
        ("{} above the limits for copies from subfolders ({}) and not copied; copy what the model needs",),
    ),
    Left(
        "config.json asks for gigabytes",
        ("e2e/test_hostile.py::test_an_absurd_config_is_refused",),
        ("config.json asks for a buffer {} of {} bytes, above the limit of {}; correct its sizes",),
    ),
)
