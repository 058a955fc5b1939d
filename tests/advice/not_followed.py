"""Messages with advice that no case follows, by reason. Prefer a case."""

from __future__ import annotations

#: Modules whose messages other tests follow.
ELSEWHERE = ("calibration.py", "calibration_data.py", "io/text_files.py", "io/parquet_file.py", "data/")
#: Reason → messages, as ``templates`` finds them.
NOT_FOLLOWED: dict[str, tuple[str, ...]] = {
    "no message: help, a title, or a part of another text": (
        "quantize a model, or resume a job that was stopped",
        "check a job's output folder against its records",
        "write a job's report as one HTML file, or as a model card",
        "quantize the tiny model that ships with bigq and compare the results",
        "write OUT/README.md, a model card for the hub, in place of the source's README; no HTML unless --out is given too",
        "leave Linears whose name matches unquantized; may be repeated",
        "tensor {}.{} is packed as {}; the model and config.json make it {}",
        "tensor {}.{} is packed as {}; the model and the job make it {}",
        "write {} … {}",
    ),
    "damaged records of a job: tests/job/test_journal.py and tests/inspect begin again in another folder": (
        "{}: has {}; run the command that made it again, or choose another folder",
        "run the job's command again to rewrite it",
        "convert the model again, into another folder",
        "restore it from a copy, or begin the job again in an empty folder",
        "run the command that made the folder again",
        "was {} when the job in {} was begun, is {} now; give the source that it was begun with, or choose another folder",
        "{}: its job.json: {}; {}: begin the job again in another folder",
        "{}: its shard {} was made from another source than {} (the weights differ); give the model that the job was st"
        "arted with, or choose another folder",
    ),
    "stopping: tests/e2e/test_signals.py, test_stress.py and test_faults.py run the same command again": (
        "interrupted; run the same command again to resume",
        "run the same command again to resume it",
        "{}: changed or replaced while the job was running; committed shards are valid, but the source is no longer the"
        " same model: restore the original files and run the same command again",
        "{}: stopped {}; run the same command again to resume",
        "{}; run the same command again to resume",
    ),
    "damaged packed checkpoints: fetched again they are the sound ones that tests/e2e/test_convert.py begins with": (
        "{}: config.json says that {} is symmetric, but Q4_0 and Q8_0 cannot hold its zero points or scales; quantize it again",
        "{}: tensor {} holds zero points other than {}, although the quantization_config of {} does not say {}: false; "
        "add that if the zero points are right, or download the checkpoint again",
        "{}: quantization_config: checkpoint_format is {}; bigq reads {}, so convert the checkpoint to one of these first",
        "bigq reads only natural order; use a checkpoint that was quantized with actorder=static or without actorder",
        "{}: quantization_config: {}; fetch it again, or give the unquantized model as MODEL",
        "{}: {} is packed, but no group of the quantization config contains it; fetch the model again",
        "{}: {} is packed, but the quantization config ignores it; fetch the model again",
        "{}: its scales are not exact in fp16, the dtype of scales in {}; keep the model in its present format",
        "{}: quantization_config: {}; fetch it again",
        "{}: {} is packed, but the quantization config skips it; fetch the model again",
        "{}: {}; fetch it again",
    ),
    "odd files in the model's folder: removing them leaves the sound folder of all cases": (
        "{}: is not a staging folder of bigq convert, but has its name; remove it, or choose another OUT",
        "{}: a link out of the model folder, to {}; replace it by a copy of the file, or give the folder with the original files as MODEL",
        "{}: a link to something that is neither a file nor a folder; remove it",
        "{}: more than {} files; give the folder of a single model as MODEL",
        "{}: neither a file nor a folder; remove it from the model folder",
    ),
    "needs a disk that is full or fails; tests/e2e/test_disk_full.py and test_faults.py free the space and run again": (
        "{}: needs about {} of disk space, but only {} are free; free some space",
        "{}: cannot be read: {}; check the disk and run the command again",
        "check the disk, then run the same command again",
        "free some space or choose another folder",
        "choose a folder with write permission",
        "{}: cannot be read: {}; check the disk, then run the same command again",
        "{}: larger than {} bytes, so bigq did not write it; choose another folder",
        "{}: stat failed: {}; check the disk, then run the same command again",
        "{}: cannot be read: {}; check that the file still exists",
        "{}: cannot be opened to read tensor {}: {}; check that it exists and is readable",
        "{}: reading at byte {} (tensor {}) failed: {}; check the disk, then run the same command again",
        "{}: cannot be listed: {}; check the disk, then run the same command again",
        "{}: cannot be read: {}; check the disk and run the command again, or remove the file to have it made again",
        "{}: cannot be written: {}; free some space, then run the same command again",
        "{}: keeps being replaced, probably by another job; stop that job, or choose another folder",
        "{}: cannot be removed: {}; remove it, or choose another folder",
        "{}: cannot store activations there: {}; free some space, or use --activations host",
        "{}: the activations file was truncated, perhaps by another program; run the command again",
    ),
    "tokenizers that GGUF cannot hold: restoring the files is what tests/io/test_gguf_file.py begins with": (
        "--prompt: the tokenizer turns it into no tokens; give some text for the model to continue",
        "{}: its tokenizer fails on the prompt ({}: {}); fetch it again",
        "{}: its tokenizer files are invalid ({}); fetch them again",
        "{}: llama.cpp does not support this tokenizer ({}); use --format gptq, or remove the tokenizer's files from th"
        "e folder to write a GGUF file that accepts only token ids",
        "{}: {} is {}, not an object; fetch it again",
        "{}: {} with id {} is not a valid token; fetch it again",
        "{}: token {} has id {}, but the model's embedding has {} rows; fetch the tokenizer of this model",
        "{}: not a valid SentencePiece model; fetch it again",
        "{}: {} is not a merge of two tokens; fetch it again",
        "{}: has a tokenizer, but no tokenizer.json or tokenizer.model, which GGUF needs; write one with AutoTokenizer."
        "from_pretrained(…).save_pretrained(…) of transformers, or use --format gptq",
        "{}: {} in added_tokens is not a valid token; fetch it again",
    ),
    "needs memory or a GPU that this machine lacks; tests/e2e/test_out_of_memory.py": (
        "{}: out of memory while generating; use fewer --max-new-tokens, or --device cpu",
        "use --device cpu, or ",
        "cannot pin {} bytes of host memory for prefetch ({}); use a smaller --read-ahead",
        "--device {}: PyTorch finds {} CUDA devices here; use --device cpu, or check the NVIDIA driver",
        "{}: out of memory ({}); use fewer --samples, a shorter --seqlen or --activations host",
        "the host is out of memory; use fewer --samples or a smaller --batch",
    ),
    "warnings and states, which advise nothing that this run needs": (
        "be above 0; leave it out to get the most likely tokens",
        "no record lists it: it is left over from a killed run or was put there by hand; remove it",
        "no job was begun here; run bigq quantize",
        "it may be running on another machine or in another container; check again whether its heartbeat advances",
        "it was asked to stop; run the same command again to resume it",
        "it ended with an error; fix that and run the same command again to resume it",
        "its process was killed; run the same command again to resume it",
        "warning: {}; the end of this run is not recorded, but the output is complete",
        "block {}: the outputs of {} calibration tokens are not finite; later blocks leave them out",
    ),
    "needs the hub; tests/e2e/test_hub.py answers in its place": (
        "{}: has no safetensors shards; convert it to safetensors first",
        "{}: no such folder, and the hub cannot be reached to fetch it; download it first or check the network",
        "{}: fetching it from the hub failed: {}; run the same command again",
        "{}: the hub sent malformed data ({}); try again later",
        "the {} {}/{} cannot be fetched ({}); give your own text with {} FILE, or use {} builtin",
        "{}: its index names a shard that the repository lacks; use another revision of it",
    ),
    "damaged shards of which the fetched ones are sound, as in the cases of this kind": (
        "{}: tensor {} {}; the file is damaged, fetch it again",
        "{}: tensor {} is missing; fetch the model again",
        "{}: tensor {} has {} rows, but row {} is needed; fetch the model again",
        "{}: ends at byte {}, before the end of tensor {} in its header; fetch it again",
    ),
    "configs that no sound model has: corrected, they are those of all cases": (
        "{}: {} needs the checkpoint's own code (auto_map); pass --trust-remote-code to run it",
        "the model's dtype is {}; bigq computes in float32, bfloat16 or float16 (choose one with --dtype)",
        "config.json asks for a buffer {} of {} bytes, above the limit of {}; correct its sizes",
        "config.json describes a model of more than {} tensors, which the checkpoint does not hold; correct it",
    ),
    "NaN or Inf in the forward pass: tests/e2e/test_nonfinite.py follows --on-nonfinite skip and --skip": (
        "{}: its outputs are not finite (NaN or Inf) for {}, beginning with {}; {}; when quantizing, --on-nonfinite ski"
        "p leaves such tokens out",
        "{}: the solve produced NaN or Inf; use a higher --damping, or {}",
        "use another --dtype (bfloat16 has more range than float16)",
        "leave this Linear unquantized with --skip or --on-nonfinite skip",
        "{}: the calibration inputs contain NaN or Inf, or their squares overflow (NaN or Inf in the Hessian); {}, or l"
        "eave out such tokens with --on-nonfinite skip",
        "{}: its Hessian is not positive definite even with damping {}; use more calibration samples, or {}",
        "{}: its inputs in the original model contain NaN or Inf, or are too large (NaN or Inf in the cross matrix); {}"
        ", or leave out such tokens with --on-nonfinite skip",
    ),
    "what is advised is not for this run, or is the only other way that there is": (
        "{}: holds files that are not the demo's; choose another folder with --out",
        "keep the model in its present format",
        "{}: llama.cpp's {} has no place for tensor {}; use --format gptq",
        "; use --format {}",
        "{} in groups of {}; use --group-size {} or -1",
        "{}: no such folder; give MODEL as a folder or a hub id",
        "choose another --format",
        ", or use --steal-lock if you know that it is dead",
        "give {} the same bits, group_size and sym, or skip all of them",
        "--format {}: {} writes {}; use --format {}",
        "--lm-head: {} is a {}, not a Linear; leave out --lm-head",
    ),
}
