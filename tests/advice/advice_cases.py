"""Messages about options, rules, output folders, formats and generating, and how each is made and followed."""

from __future__ import annotations

import shutil
from dataclasses import replace

from follow import line
from place import (
    CONVERT,
    EVAL,
    GENERATE,
    PLAN,
    RTN,
    Case,
    asked,
    begun,
    bf16,
    converted,
    elsewhere,
    huge,
    metadata,
    no_tokenizer_place,
    own_code,
    packed,
    pickled,
    quantized,
    restored,
    tokenizer,
    tokens,
    twice,
    unfinished,
    versioned,
    widened,
)

#: A plan in a format that has one group size.
BNB = PLAN.replace("--group-size 32", "--group-size 64 --format bnb-nf4")

#: A plan in a format that has whole rows.
WHOLE_ROWS = PLAN.replace("--group-size 32", "--group-size -1 --format w8a8-int8")

OPTIONS = (
    Case("give a command: {}", "", follow=lambda p: ["plan", p.model, "--group-size", "32"]),
    Case(
        "{} and {}: contradict each other; give one of them",
        PLAN + " --sym --asym",
        follow=lambda p: ["plan", p.model, "--group-size", "32", "--asym"],
    ),
    Case("; did you mean {}?", PLAN + " --bitz 4"),
    Case("; did you mean {}?", PLAN + " --method gptk"),
    Case("{}: no effect {}; add that, or leave out {}", PLAN + " --alpha 0.3"),
    Case("{}: no effect {}; add that, or leave out {}", PLAN + " --tune-steps 8"),
    Case("--push-drop: no effect without --push; add that, or leave out --push-drop", PLAN + " --push-drop"),
    Case(
        "--push-drop: removes the shards that a GGUF file is made from; leave out --push-drop",
        PLAN + " --format gguf --push owner/name --push-drop",
    ),
    Case("--attention fused: no effect on {}, only on BLOOM and MPT; leave out --attention", PLAN + " --attention fused", family="gpt2"),
    Case("leave out --rotate", PLAN + " --rotate", family="gpt2"),
    Case(
        "codes, scales and zero points are {} bits per weight; use --bits-per-weight {} or more",
        PLAN + " --bits-per-weight 2.1",
        follow=lambda p: ["plan", p.model, "--samples", "4", "--seqlen", "16", "--group-size", "32", "--bits-per-weight", "2.563"],
    ),
    Case(
        "--bits-per-weight: no effect, since the bits of no Linear are left to choose; leave it out",
        PLAN + " --bits-per-weight 4 --rule .*:bits=4",
        follow=lambda p: ["plan", p.model, "--samples", "4", "--seqlen", "16", "--group-size", "32", "--rule", ".*:bits=4"],
    ),
    Case("--seqlen {}: the model has {} positions; use --seqlen {} or less", PLAN + " --seqlen 4096"),
    Case(
        "which holds {} significant bits; use --scale-bits {}, or leave it out",
        PLAN + " --format compressed-tensors --scale-bits 11",
        bf16,
    ),
    Case("--lm-head: {} has the input embedding's weight", PLAN + " --lm-head", family="tied"),
    Case("--tune-steps {}: tunes no models with experts; leave it out", PLAN + " --method gptaq --tune-steps 4", family="mixtral"),
    Case("--scale-bits {}: {} stores scales in a form of its own; leave it out", BNB + " --scale-bits 8"),
    Case("--tune-steps {}: {} stores no integers; leave it out", BNB + " --method gptaq --tune-steps 4"),
    Case("--bits-per-weight {}: {} holds {} bits only; leave it out", BNB + " --bits-per-weight 4.5"),
    Case("--lm-head: {} holds Linears inside blocks only; leave out --lm-head", BNB + " --lm-head"),
    Case(
        "{}: needs calibration, which {} has not; use --method gptq, or {}",
        WHOLE_ROWS + " --method rtn --input-scales static",
    ),
    Case(
        "{}: needs calibration, which {} has not; use --method gptq, or {}",
        PLAN.replace(" --group-size 32", " --format nvfp4-w4a4 --method rtn"),
    ),
    Case(
        "--input-scales static: {} has no static scales of inputs; use {}, or leave it out",
        PLAN.replace(" --group-size 32", " --format nvfp4") + " --input-scales static",
    ),
    Case(
        "{}: stores numbers for inputs, of which experts ({}) get none; {}, or leave experts unquantized with",
        WHOLE_ROWS.replace("w8a8-int8", "fp8") + " --input-scales static",
        family="mixtral",
        then="allow-partial",
    ),
    Case("{}: its readers take no experts, which {} has; use --format {}", BNB, family="mixtral"),
    Case("leave it out", BNB + " --bits 3"),
    Case("leave it out", BNB + " --asym"),
    Case(
        "{}: {} holds only {}; leave this out of the rule",
        BNB + " --rule '.*q_proj:bits=8,damping=0.02'",
        follow=lambda p: line(BNB + " --rule '.*q_proj:damping=0.02'", model=p.model),
    ),
    Case("use {}", PLAN + " --group-size 40"),
    Case("use {}", PLAN + " --format gguf --bits 3"),
    Case("use {}", PLAN + " --format compressed-tensors --group-size 128", family="gpt2"),
    Case("{}this job would leave {}; use {}--allow-partial to go on with the rest", PLAN + " --format gptq", widened),
    Case(
        "{}this job would leave {}; use {}--allow-partial to go on with the rest",
        PLAN.replace("--group-size 32", "--group-size -1") + " --format gptq",
        widened,
    ),
    Case("--activations gpu: the job runs on a CPU; use host, disk or auto", PLAN + " --activations gpu"),
    Case("--device {}: not a device; use auto, cpu or cuda:0", PLAN.replace("--device cpu", "--device toaster"), then="CUDA"),
    Case("--device {}: bigq supports only CPUs", PLAN.replace("--device cpu", "--device mps"), then="CUDA"),
    Case(
        "--trace {}: its folder does not exist; make it first",
        RTN + " --trace {tmp}/traces/t.json",
        follow=lambda place: (place.tmp / "traces").mkdir(),
    ),
    Case(
        "--seqlen 1: a row of one token predicts nothing; use 2 or more",
        "eval {model} --data {ids} --seqlen 1 --device cpu --quiet",
    ),
    Case(
        "--seqlen {}: the model has {} positions; use --seqlen {} or less",
        "eval {model} --data {ids} --seqlen 4096 --device cpu --quiet",
        then="rows",
    ),
)

RULES = (
    Case("{}; use '{}'", PLAN + " --skip o_proj"),
    Case("{}; did you mean '{}'?", PLAN + " --skip '.*oproj'"),
    Case("{}; '{}' would match, but readers load {} as one Linear: use '{}'", PLAN + " --rule q_proj:bits=8"),
    Case("{}; did you mean '{}'? Readers load {} as one Linear", PLAN + " --rule '.*qproj:bits=8'"),
    Case("use '{}'", PLAN + " --rule '.*q_proj:bits=8'"),
    Case("use '{}'", PLAN + r" --skip '.*\.up_proj$'"),
    Case("{}; give it first, or leave it out", PLAN + " --rule '.*:bits=8' --rule '.*down_proj:bits=3'"),
    Case("{}; leave it out", PLAN + " --skip '.*mlp' --skip '.*down_proj'"),
    Case(
        "{}: matches only the output head {}, which is quantized with --lm-head; add --lm-head or leave out this rule",
        PLAN + " --rule lm_head:bits=8",
    ),
    Case("{}: the output head {} stays unquantized unless --lm-head is given; leave out this --skip", PLAN + " --skip lm_head"),
    Case(
        "--skip: no Linear would be quantized; give narrower patterns",
        PLAN + " --skip '.*'",
        follow=lambda place: None,
        then="no Linear",
    ),
)

FOLDERS = (
    Case("{}: OUT is a file; give a folder", RTN, no_tokenizer_place, elsewhere),
    Case(
        "{}: OUT is not empty and holds no bigq job; choose another folder, or empty it",
        RTN,
        lambda place: (place.out.mkdir(), (place.out / "x").write_text("")),
        elsewhere,
    ),
    Case(
        "{}: the job in {} was begun with {}; resume it with that (options that are not given keep their values), or choose another folder",
        RTN.replace("{model}", "{original}") + " --format gptq_v2 --asym --bits 3",
        begun,
        elsewhere,
    ),
    Case(
        "{}: OUT and MODEL ({}) must be separate folders, neither inside the other; choose another OUT",
        RTN.replace("{out}", "{model}"),
        None,
        lambda p: line(RTN, model=p.model, out=p.out),
    ),
    Case("{}: holds no job of bigq; name the output folder of bigq quantize or bigq convert", "verify {model}", None, packed),
    Case("{}: holds no job of bigq; name the output folder of bigq quantize or bigq convert", "status {model}", None, packed),
    Case("{}: is not quantized; convert takes a packed checkpoint", CONVERT + " --to gptq", None, packed, then="zero points of 0"),
    Case(
        "{}: has zero points of 0, which the {} format cannot hold; use --to gptq_v2", CONVERT + " --to gptq", packed, None, then="already"
    ),
    Case(
        "{}: exists and is not empty; choose another folder, or empty it",
        CONVERT + " --to compressed-tensors",
        lambda p: (packed(p), p.out.mkdir(), (p.out / "x").touch()),
        elsewhere,
    ),
    Case(
        "{}: exists already; name a file that does not",
        CONVERT + " --to gguf",
        lambda p: (packed(p), p.out.touch()),
        elsewhere,
        then="GGUF|minimums|fp16",
    ),
    Case(
        "{}: no such folder; convert takes the folder of a quantized model",
        CONVERT + " --to gptq",
        lambda p: shutil.rmtree(p.model),
        lambda p: shutil.copytree(p.done, p.model),
        then="zero points of 0",
    ),
)

MORE = (
    Case(
        "quantize the original model with --format gguf {}",
        "convert {model} {tmp}/x.gguf --to gguf --quiet",
        lambda p: quantized(p, "--bits 3"),
        lambda p: [*line(RTN.replace("{model}", "{original}"), **vars(p)), "--bits", "4", "--format", "gguf"],
    ),
    Case("use --scale-bits {}, or leave out --scale-bits", PLAN + " --format gguf --asym --scale-bits 11"),
    Case(
        "{}: it or MODEL is a link that leads to itself; name a folder",
        CONVERT + " --to compressed-tensors",
        lambda p: (packed(p), p.out.symlink_to(p.out.name)),
        lambda p: p.out.unlink(),
    ),
    Case("--prompt: is empty; give some text", GENERATE.replace("w5", "''"), tokenizer, asked(GENERATE)),
    Case("--chat: the tokenizer of {} has no chat template; leave --chat out", GENERATE + " --chat", tokenizer),
    Case(
        "but the model has {} positions; give a shorter one",
        GENERATE.replace("w5", f"'{'w5 ' * 200}'"),
        tokenizer,
        asked(GENERATE),
    ),
    Case("{}; generating needs a tokenizer: add its files to the folder", GENERATE, None, tokenizer),
    Case("but the model has {}; fetch the tokenizer of this model", GENERATE, lambda p: tokens(p, w5=4000), tokenizer),
    Case("{}give {} {} or more", PLAN + " --ram 1KiB"),
    Case("{}give {} {} or more", PLAN + " --disk 1KiB"),
    Case("free as much, or ", PLAN + " --on a100 --samples 100000000".replace("--device cpu", ""), None, asked(PLAN, samples="4")),
    Case(
        "its weights need a scale above 65504, the maximum of fp16; leave this Linear unquantized with --skip",
        RTN,
        huge,
        lambda p: [*line(RTN.replace("{out}", "{tmp}/other"), **vars(p)), "--skip", ".*down_proj"],
    ),
    Case(
        "{}: is missing because the bigq job in this folder is not finished; run its command again to resume it",
        EVAL,
        unfinished,
        packed,
    ),
    Case("{}: model type {} needs the checkpoint's own code; pass --trust-remote-code to run it", PLAN, own_code),
    Case(
        "{}: tensor {} is also in {}; fetch the model again",
        RTN,
        lambda p: twice(p),
        restored,
    ),
    Case("{}: __metadata__ is {}, not an object of strings; fetch the file again", PLAN, lambda p: metadata(p), restored),
    Case(
        "{}: contains pickle checkpoints (.bin, .pt), which bigq never loads since they can run code; convert them",
        RTN,
        lambda p: pickled(p),
        restored,
    ),
    Case("{}; Linears are called {}{}", PLAN + " --skip '.*router'", None, lambda p: [*line(PLAN, **vars(p)), "--skip", ".*o_proj"]),
    Case("is too long or repeats too much to be matched in bounded time; use at most", PLAN + " --skip '(a*)*b'", None, asked(PLAN)),
    Case("{}: OUT holds a converted model, in which no job can run; choose another folder", RTN, lambda p: converted(p), elsewhere),
    Case(
        "{}: bigq writes no GGUF files of model type {}, only of {}; use --format gptq or compressed-tensors",
        PLAN + " --format gguf",
        family="bloom",
    ),
    Case("which llama.cpp computes differently; use --format gptq", PLAN + " --format gguf", lambda p: p.config(hidden_act="gelu")),
    Case(
        "{}: {}; the file is damaged or from another version of bigq; start the job again in another folder",
        RTN.replace("{model}", "{original}"),
        lambda p: (begun(p), versioned(p)),
        elsewhere,
    ),
    Case(
        "{}: is the current folder, which cannot be replaced; name another one",
        "convert {model} . --to compressed-tensors --quiet",
        packed,
        lambda p: line(CONVERT + " --to compressed-tensors", **vars(p)),
    ),
    Case(
        "{}: is the root of the file system; name another folder",
        "convert {model} / --to compressed-tensors --quiet",
        packed,
        lambda p: line(CONVERT + " --to compressed-tensors", **vars(p)),
    ),
    Case(
        "{}: is a folder, or its folder does not exist; name a file in an existing folder",
        "convert {model} {tmp}/no/x.gguf --to gguf --quiet",
        packed,
        lambda p: line("convert {model} {tmp}/x.gguf --to gguf", **vars(p)),
        then="fp16 numbers",
    ),
    Case(
        "quantize the model with --format gguf",
        "convert {model} {tmp}/x.gguf --to gguf --quiet",
        packed,
        lambda p: [*line(RTN.replace("{model}", "{original}"), **vars(p)), "--asym", "--format", "gguf"],
    ),
    Case("use {}", PLAN + " --format awq --bits 8"),
    Case("use {}", PLAN + " --format w8a8-int8 --group-size 32"),
    Case("leave it out", WHOLE_ROWS + " --bits 8 --asym"),
    Case("use {}", PLAN + " --format awq --group-size 16"),
    Case("use {}", PLAN + " --format awq --rule '.*o_proj:group_size=64'"),
    Case("use {}", "convert {model} {out} --to compressed-tensors --quiet", lambda p: quantized(p, "--format gptq"), None, family="gpt2"),
    Case(
        "{}: its scales are not exact in {}, the dtype of scales in {}; quantize the original model",
        CONVERT + " --to compressed-tensors",
        lambda p: (bf16(p), quantized(p, "--scale-bits 11 --format gptq")),
        lambda p: (restored(p), bf16(p), quantized(p, "--scale-bits 8 --format gptq")),
    ),
)


#: Of options and rules, a model of one block shows as much.
PLANNED = tuple(replace(case, family="small") if case.family == "llama" else case for case in (*OPTIONS, *RULES))
OPTION_CASES = (*MORE, *PLANNED, *FOLDERS)
