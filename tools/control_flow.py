"""What a kernel issues, from its machine code and its control flow.

A kernel's code is cut into basic blocks. Blocks that are taken rarely are left out; each loop that is left is
counted by its longest way from head to backward branch, and the kernel by its longest way from entry to exit.
Rare is what the machine code itself says (a call of a slow path, a branch for lanes that came apart) or a
comment in the source, at the line that opens the block, says:

    if (...) {  // rare: the reason
    if (...) {  // anew: left out where similarities come from the cache
    for (...) {  // times: 4, the number of rounds
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)(?: inlined at "([^"]+)", line (\d+))?')
KINDS = ("HMMA", "LDSM", "LDS", "LDGSTS")  # counted apart; the rest is one number


@dataclass
class Instruction:
    mnemonic: str
    predicate: str | None
    operands: str
    lines: tuple = ()  # (file, line), the innermost of the inlined functions first

    @property
    def family(self):
        return self.mnemonic.split(".")[0]


@dataclass
class Block:
    instructions: list = field(default_factory=list)
    next: list = field(default_factory=list)  # indices of the blocks that may follow
    rare: str | None = None  # why


@dataclass
class Loop:
    head: int
    body: frozenset
    counts: Counter = field(default_factory=Counter)  # issued in a round, by mnemonic
    in_code: int = 0  # instructions between its head and its backward branch, rare ones too
    place: tuple | None = None  # (file, line)
    times: int | None = None  # None: not told
    told: frozenset = frozenset()  # the places of the comments that tell of it and of the loops in it

    @property
    def hmma(self):
        return kinds(self.counts)["HMMA"]

    @property
    def multiplies(self):
        return self.hmma > 0


@dataclass
class Flow:
    """counts: one way through the kernel without its product loops; loops: those that multiply, without the
    loops around them, and the innermost of the others."""

    counts: Counter
    loops: list
    rare: dict  # reason: instructions left out
    untold: list  # places of loops whose rounds nobody told, counted once

    @property
    def waits(self):
        """How often the warp waits for memory."""
        return sum(n for mnemonic, n in self.counts.items() if mnemonic.endswith(WAITED))

    @property
    def product_loops(self):
        return [loop for loop in self.loops if loop.multiplies]

    @property
    def costliest_product(self):
        """The product loop that issues most for an HMMA."""
        return max(self.product_loops, key=lambda x: x.counts.total() / kinds(x.counts)["HMMA"])


# ---- reading -------------------------------------------------------------------------------------------


def read_kernels(text):
    """{mangled name: [(label or None, Instruction or None)]} from `nvdisasm -c -gi`."""
    kernels, items, lines, fresh = {}, None, (), False
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line)
        if section:
            items = kernels.setdefault(section[1], [])
            lines = ()
            continue
        if items is None:
            continue
        label = re.match(r"([.$\w]+):\s*$", line)
        if label:
            items.append((label[1], None))
            continue
        place = LINE.match(line)
        if place:
            here = (place[1], int(place[2]))
            lines = (*lines, here) if fresh else (here,)
            fresh = place[3] is not None
            continue
        instruction = INSTRUCTION.match(line)
        if instruction:
            fresh = False
            _, predicate, mnemonic, operands = instruction.groups()
            items.append((None, Instruction(mnemonic, predicate, operands, lines)))
    return {name: own_code(name, items) for name, items in kernels.items()}


def own_code(name, items):
    """Without the compiler's slow paths, which stand behind the kernel."""
    for i, (label, _) in enumerate(items):
        if label and label.startswith("$") and name not in label.split("$")[1:2]:
            return items[:i]
    return items


def cut(items):
    """The basic blocks."""
    blocks, labels = [Block()], {}
    for label, instruction in items:
        if label:
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label] = len(blocks) - 1
            continue
        blocks[-1].instructions.append(instruction)
        if instruction.family in ("BRA", "EXIT", "RET", "BRX", "JMP"):
            blocks.append(Block())
    for i, block in enumerate(blocks):
        if not block.instructions:
            continue
        mark_waits(block)
        last = block.instructions[-1]
        # BRX, a jump by a table, names all its targets.
        targets = re.findall(r"\.L_\w+", last.operands) if last.family in ("BRA", "BRX") else []
        for target in targets:
            block.next.append(labels[target])
            if last.mnemonic.startswith("BRA.DIV"):
                blocks[labels[target]].rare = "lanes of a warp apart (BRA.DIV)"
        always = last.predicate is None and not last.operands.startswith(("!", "P", "U"))
        ends = last.family in ("EXIT", "RET", "BRX", "JMP", "BRA") and (always or last.family == "BRX")
        if not ends and i + 1 < len(blocks):
            block.next.append(i + 1)
    return blocks


WAITED = ".WAITED"  # ends the mnemonic of a load for which a warp comes to wait anew


def mark_waits(block):
    """Marks, among loads from global memory, those that nothing loaded before is still on its way with.

    A warp issues in order: it waits where it first uses what was loaded, and loads that were begun by then
    have all arrived. What is still on its way when a block ends is taken to be waited for there.
    """
    on_its_way = set()
    for x in block.instructions:
        target, _, sources = x.operands.partition(",")
        used = set(re.findall(r"\bR(\d+)\b", sources if x.family not in ("STG", "STS") else x.operands))
        if used & on_its_way:
            on_its_way.clear()
        if x.family != "LDG" or not re.match(r"R\d+", target):
            continue
        width = next((int(m) // 32 for m in x.mnemonic.split(".") if m in ("64", "128")), 1)
        if not on_its_way and not x.mnemonic.endswith(WAITED):  # an earlier analysis may have marked it
            x.mnemonic += WAITED
        first = int(target.strip()[1:])
        on_its_way.update(str(first + i) for i in range(width))


# ---- what the source says ------------------------------------------------------------------------------


@cache
def remarks(path):
    """[(first line, last line, kind, text)] of the blocks that a comment says something about."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return []
    found = []
    for first, line in enumerate(lines, 1):
        remark = re.search(r"//.*?\b(rare|anew|times): (.*)$", line)
        if not remark:
            continue
        depth, last = 0, first
        for last, text in enumerate(lines[first - 1 :], first):
            code = text.split("//")[0]
            if last == first:  # `} else {` closes another block
                code = code[code.rfind("{") :] if "{" in code else ""
            least = depth  # of the line: `} else {` ends the block here
            for letter in code:
                depth += (letter == "{") - (letter == "}")
                least = min(least, depth)
            if depth <= 0 or (last > first and least <= 0):
                break
        found.append((first, last, remark[1], remark[2]))
    return found


def mark_rare(blocks, kinds=("rare",)):
    for i, block in enumerate(blocks):
        calls = [x for x in block.instructions if x.family == "CALL"]
        if calls and not block.rare:
            slow_path = re.search(r"__cuda_\w+?_(\w+?)_slowpath", calls[0].operands)
            block.rare = f"slow path of {slow_path[1] if slow_path else 'a function'}"
        # A block is rare if most of its instructions come from a rare place: what only it uses may have been
        # moved there from before. Where ways meet again some stand that belong to the rare one only by name.
        places = [x for x in block.instructions if x.lines and x.family not in MEETING]
        reasons = [reason for x in places if (reason := rare_reason(x, kinds))]
        if 2 * len(reasons) > len(places) and not block.rare and not unavoidable(blocks, i):
            block.rare = reasons[0]


MEETING = ("BSYNC", "BSSY", "NOP", "BRA", "EXIT")


def unavoidable(blocks, avoided):
    """Whether every way from the entry to an exit leads through a block."""
    seen, stack = {avoided, 0}, [0] if avoided else []
    while stack:
        block = blocks[stack.pop()]
        if block.instructions and block.instructions[-1].family in ("EXIT", "RET"):
            return False
        for n in block.next:
            if n not in seen:
                seen.add(n)
                stack.append(n)
    return True


def rare_reason(instruction, kinds):
    for file, line in instruction.lines:
        for first, last, kind, text in remarks(file):
            if kind in kinds and first < line <= last:
                return text
    return None


def rounds_of(loop, blocks, inner):
    """How often a comment says the loop runs, and where the loop is.

    The comment is one of a line that the loop comes from, and of a block that most of the loop, without the
    loops in it, comes from: the smallest such block of which no loop in it is told already, since compilers
    move instructions of outer loops into inner ones, and of inner ones out.
    """
    before = frozenset().union(*(x.told for x in inner))
    deeper = {i for x in inner for i in x.body}
    own = [x for i in sorted(loop.body - deeper) for x in blocks[i].instructions if x.lines]
    found = []
    for file, line in sorted({place for x in own for place in x.lines}):
        for first, last, kind, text in remarks(file):
            if kind != "times" or line != first or (file, line) in before:
                continue
            within = sum(any(f == file and first <= n <= last for f, n in x.lines) for x in own)
            if 2 * within > len(own):
                found.append((last - first, file, line, text))
    if not found:
        return None, own[-1].lines[0] if own else None
    _, file, line, text = min(found)
    return int(re.match(r"\d+", text)[0]), (file, line)


# ---- loops and ways ------------------------------------------------------------------------------------


def dominators(blocks):
    """The immediate dominator of each reachable block, and the blocks in reverse postorder."""
    order, seen, stack = [], {0}, [(0, iter(hot_next(blocks, 0)))]
    while stack:
        node, following = stack[-1]
        for n in following:
            if n not in seen:
                seen.add(n)
                stack.append((n, iter(hot_next(blocks, n))))
                break
        else:
            order.append(node)
            stack.pop()
    order.reverse()
    number = {b: i for i, b in enumerate(order)}
    before = {b: [] for b in order}
    for b in order:
        for n in hot_next(blocks, b):
            before[n].append(b)
    idom = {0: 0}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = None
            for p in before[b]:
                if p not in idom:
                    continue
                other = p
                while new is not None and other != new:
                    if number[other] > number[new]:
                        other = idom[other]
                    else:
                        new = idom[new]
                new = other if new is None else new
            if idom.get(b) != new:
                idom[b], changed = new, True
    return idom, order, before


def hot_next(blocks, i):
    return [n for n in blocks[i].next if not blocks[n].rare and blocks[n].instructions]


def find_loops(blocks):
    """Natural loops, the inner ones first."""
    idom, order, before = dominators(blocks)

    def dominates(a, b):
        while b != a and b != 0:
            b = idom[b]
        return a == b

    bodies = {}
    for b in order:
        for head in hot_next(blocks, b):
            if not dominates(head, b):
                continue
            body, stack = {head}, [b]
            while stack:
                n = stack.pop()
                if n not in body:
                    body.add(n)
                    stack.extend(before[n])
            bodies.setdefault(head, set()).update(body)
    loops = [Loop(head, frozenset(body)) for head, body in bodies.items()]
    return sorted(loops, key=lambda loop: len(loop.body)), order


def longest(blocks, nodes, start, order, inside):
    """The way through `nodes` from start that issues most; inside: {head: (body, counts)} of loops in it."""
    owner = {b: head for head, (body, _) in inside.items() for b in body}
    best = {start: Counter()}
    result = Counter()
    for b in order:
        if b not in nodes:
            continue
        if b in owner and owner[b] != b:
            continue
        if b not in best:
            continue
        if b in owner:
            body, counts = inside[b]
            total = best[b] + counts
            following = {n for i in body for n in hot_next(blocks, i) if n not in body}
        else:
            total = best[b] + Counter(x.mnemonic for x in blocks[b].instructions)
            following = set(hot_next(blocks, b))
        if total.total() > result.total():
            result = total
        for n in following:
            n = owner.get(n, n) if n in nodes else n
            if n in nodes and n != start and (n not in best or best[n].total() < total.total()):
                best[n] = total
    return result


@cache
def formula_of(file):
    """The formula whose file in csrc/losses this is, or None."""
    path = Path(file)
    return (
        path.stem
        if path.parent.name == "formulas" and path.stem not in ("formula", "dual", "derivatives")
        else None
    )


def of_other_formula(instruction, formula):
    """Whether it comes from the file of one loss's formula, and from another one's than that."""
    formulas = {formula_of(file) for file, _ in instruction.lines} - {None}
    return bool(formulas) and formula not in formulas


def leave_out_other_formulas(blocks, formula):
    """A kernel branches into the loops of its formula: only one of them is taken, and what leads to it."""
    for block in blocks:
        if not block.rare and any(of_other_formula(x, formula) for x in block.instructions):
            block.rare = OTHER_FORMULA
    before, leads_out, stack = {}, set(), []
    for i, block in enumerate(blocks):
        if block.instructions and block.instructions[-1].family in ("EXIT", "RET"):
            stack.append(i)
        for n in block.next:
            before.setdefault(n, []).append(i)
    while stack:
        i = stack.pop()
        if i not in leads_out and not blocks[i].rare:
            leads_out.add(i)
            stack.extend(before.get(i, []))
    for i, block in enumerate(blocks):
        if i not in leads_out and not block.rare:
            block.rare = OTHER_FORMULA


OTHER_FORMULA = "another formula"


def analyse(items, formula=None, cached=False):
    """The Flow of one kernel; with a formula, where it computes that one, else where it takes longest.
    cached:
    where it finds the similarities in the cache."""
    blocks = cut(items)
    mark_rare(blocks, ("rare", "anew") if cached else ("rare",))
    if formula:
        leave_out_other_formulas(blocks, formula)
    rare = Counter()
    for block in blocks:
        if block.rare and block.rare != OTHER_FORMULA:
            rare[block.rare] += len(block.instructions)
    loops, order = find_loops(blocks)
    done = []  # of the loops seen so far those that no other one contains
    innermost, untold = [], []
    for loop in loops:
        inner = {x.head: x for x in done if x.body <= loop.body and x is not loop}
        loop.counts = longest(
            blocks, loop.body, loop.head, order, {h: (x.body, issued(x)) for h, x in inner.items()}
        )
        lowest, highest = min(loop.body), max(loop.body)
        loop.in_code = sum(len(blocks[i].instructions) for i in range(lowest, highest + 1))
        loop.times, loop.place = rounds_of(loop, blocks, inner.values())
        loop.told = frozenset({loop.place}).union(*(x.told for x in inner.values()))
        if not inner or (loop.multiplies and not any(x.multiplies for x in inner.values())):
            innermost.append(loop)
        if loop.times is None and not loop.multiplies:
            untold.append(loop.place)
        done = [x for x in done if x.head not in inner] + [loop]
    everything = set(order)
    counts = longest(blocks, everything, 0, order, {x.head: (x.body, issued(x)) for x in done})
    return Flow(counts, innermost, dict(rare), untold)


def issued(loop):
    """By all rounds; a product loop is counted apart."""
    if loop.multiplies:
        return Counter()
    rounds = loop.times or 1
    return Counter({mnemonic: rounds * n for mnemonic, n in loop.counts.items()})


def kinds(counts):
    """HMMA, LDSM, LDS, LDGSTS and the rest."""
    parts = dict.fromkeys((*KINDS, "rest"), 0)
    for mnemonic, count in counts.items():
        family = mnemonic.split(".")[0]
        parts[family if family in KINDS else "rest"] += count
    return parts


def global_bytes(counts):
    """What a warp moves between its multiprocessor and L2, if all its lanes take part."""
    total = 0
    for mnemonic, count in counts.items():
        family, *modifiers = mnemonic.split(".")
        if family in ("LDG", "STG", "LDGSTS"):
            widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
            total += 32 * count * next((widths[m] for m in modifiers if m in widths), 4)
    return total


def multiply_adds(counts):
    """Of a warp's HMMA instructions, by the shape in their names."""
    shapes = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}
    total = 0
    for mnemonic, count in counts.items():
        if mnemonic.startswith("HMMA."):
            total += count * shapes[mnemonic.split(".")[1]]
    return total
