"""AutoAttack and the other cascades in a report: the accuracy after each stage, its cost, and what makes it doubtful."""

from collections.abc import Sequence
from html import escape

from jaxrd.evaluation import page, plots, tables
from jaxrd.evaluation.names import attack_name, attack_order
from jaxrd.evaluation.runs import Run, spread

_COSTS = {"seconds": "seconds", "forwards": "forwards per<br>robust image", "backwards": "backwards per<br>robust image"}
_NOTE = (
    "Each attack is given only the images that those before it left correctly classified, so each accuracy is that of the "
    "worst case so far.")
_COST_NOTE = (
    "Seconds: wall time of all stages. Forwards and backwards: passes through the network, in all stages, each image of a "
    "batch counted as one and those that were broken on the way included; their number is divided by that of the images robust "
    "at the end.")


def sections(groups: Sequence[dict], members: Sequence[Sequence[Run]], lines: Sequence[plots.Line]) -> list[str]:
    """Returns the HTML of one section per cascade that was run, such as "AutoAttack, stage by stage".

    Args:
      groups: from `runs.aggregate`.
      members: the runs of each group.
      lines: the groups' lines in plots, for their colours.
    """
    present = {name for runs in members for run in runs for name in run.evaluation.get("cascades", {})}
    return [page.section(f"{attack_name(name)}, stage by stage", _stages(name, groups, members, lines))
            for name in sorted(present, key=attack_order)]


def flag_box(groups: Sequence[dict]) -> str:
    """Returns the HTML of a box that lists what makes accuracies doubtful, or nothing where nothing does."""
    found = tables.flags(groups)
    items = "".join(f"<li><b>{escape(where)}</b>: {escape(flag)}</li>" for where, flag in found)
    return f'<div class="flags" role="note"><p>† These accuracies are doubtful</p><ul>{items}</ul></div>' if found else ""


def _stages(name, groups, members, lines):
    rows = []
    for group, runs, line in zip(groups, members, lines):
        evaluations = [run.evaluation for run in runs if name in run.evaluation.get("cascades", {})]
        if evaluations:
            values = spread([evaluation["cascades"][name]["stages"] for evaluation in evaluations])
            rows.append((group | {"values": values, "seeds": len(evaluations)}, line, tables.mark(group, name),
                         spread([_costs(evaluation, name) for evaluation in evaluations])))
    stages = list(dict.fromkeys(stage for group, *_ in rows for stage in group["values"]))
    costs = [key for key in _COSTS if any(key in spent for *_, spent in rows)]
    several = any(group["seeds"] > 1 for group, *_ in rows)
    body = []
    for group, line, mark, spent in rows:
        last = list(group["values"])[-1]
        body.append([
            page.key(line.colour) + escape(group["label"]),
            *([str(group["seeds"])] if several else []),
            *(page.number(tables.cell(group, stage), mark if stage == last else "") for stage in stages),
            *(_cost(spent[key]["mean"]) if key in spent else "-" for key in costs)])
    after = ["clean" if stage == "clean" else "after " + escape(attack_name(stage.replace("-", "_"))) for stage in stages]
    header = ["method", *(["seeds"] if several else []), *after, *(_COSTS[key] for key in costs)]
    definitions = [run.evaluation.get("attacks", {}).get(name) for runs in members for run in runs]
    descriptions = [str(definition["description"]) for definition in definitions
                    if isinstance(definition, dict) and definition.get("description")]
    notes = [*descriptions[:1], _NOTE, *([_COST_NOTE] if costs else [])]
    return page.html_table(header, body, 1) + f'<p class="note">{escape(" ".join(notes))}</p>'


def _costs(evaluation, name):
    """Returns what the cascade cost: seconds, and passes per robust image."""
    found, costs = evaluation["cascades"][name], {}
    if found.get("seconds"):
        costs["seconds"] = sum(found["seconds"].values())
    examples = evaluation.get("data", {}).get("examples")
    robust = round(list(found["stages"].values())[-1] * examples) if isinstance(examples, int) else 0
    if robust > 0 and found.get("passes"):
        forwards, backwards = map(sum, zip(*found["passes"].values()))
        costs |= {"forwards": forwards / robust, "backwards": backwards / robust}
    return costs


def _cost(value):
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
