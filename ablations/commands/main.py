"""The command vit-ablations."""

import os
import sys
from contextlib import nullcontext, redirect_stdout

from ablations.commands.conducting import execute
from ablations.commands.foreseeing import describe, foresee, foresee_hours
from ablations.commands.options import each, read
from ablations.commands.sending import launch
from ablations.study import jobs, machine, processes, running
from ablations.study.signals import Stop, Stopped, take_minutes
from ablations.study.speaking import Console, all_values, one_message, words
from core import plugins


def main() -> None:
    """Exit status: 0; 1 if a cell failed; 2 for bad input or a full disk; 75 if --max-minutes were over; 130 and 143
    if told to end by SIGINT and SIGTERM. After the last three, the same command continues."""
    console = Console(stderr="--json" in sys.argv[1:], quiet=not processes.leads(), markup=False, highlight=False)
    stop = Stop()
    try:
        with one_message(processes.named):
            arguments = words()
            plugins.load(all_values("--plugin", arguments))
            if "--list" in arguments:
                describe(console)
                return
            command = read(arguments, console)
            commands = each(command)
            if command.plan:
                told = sys.stdout
                with redirect_stdout(sys.stderr) if command.json else nullcontext():  # what a user's code prints, too
                    (foresee_hours if command.hours else foresee)(command, console, told)
                return
            with stop.listening(command.max_minutes):
                if command.worker:
                    jobs.follow_parent()
                try:
                    with processes.joined(machine.named(command.recipe.device), command.recipe.parallel):
                        elsewhere = command.launcher != "here"
                        failed = sum(
                            launch(one, console) if elsewhere else execute(one, console, stop) for one in commands
                        )
                except running.Poisoned as error:
                    print(f"{error}: the next cell begins in a fresh process", file=sys.stderr, flush=True)
                    left = take_minutes()
                    os.execv(sys.executable, jobs.command(*(["--max-minutes", str(left)] if left else [])))
    except KeyboardInterrupt as error:
        told = error.status if isinstance(error, Stopped) else 130
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(told)
    sys.exit(1 if failed else 0)
