"use strict";
// The search-tree page. Only rows in sight exist as elements, so 20 nodes and 20,000 answer a key equally fast.
// Everything a model wrote reaches the page through textContent.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const ROW = 30, SPARE = 8, HIGHLIGHTED = 20000;
  const INVISIBLE = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
  const TOKENS = new RegExp([
    "(<\\/?[a-z_]{1,24}>|<\\|[^|\\n]{1,40}\\|>)", "(#[^\\n]*)",
    "(\"\"\"[^]*?\"\"\"|'''[^]*?'''|\"(?:\\\\.|[^\"\\\\\\n])*\"|'(?:\\\\.|[^'\\\\\\n])*')",
    "\\b(and|as|assert|break|class|continue|def|del|elif|else|except|False|finally|for|from|global|if|import|in|is|lambda" +
    "|None|nonlocal|not|or|pass|raise|return|True|try|while|with|yield|print)\\b",
    "\\b(\\d+(?:\\.\\d+)?(?:e[+-]?\\d+)?)\\b",
  ].join("|"), "g");
  const CLASSES = ["t-mark", "t-comment", "t-string", "t-word", "t-number"];

  // --- the nodes -------------------------------------------------------------------------------------------------
  const nodes = data.rows.map((row, index) => {
    const node = {index, children: [], open: false, depth: 0};
    data.fields.forEach((name, place) => { node[name] = row[place]; });
    return node;
  });
  for (const node of nodes) {
    node.up = node.parent < 0 ? null : nodes[node.parent];
    if (!node.up) continue;
    node.place = node.up.children.push(node);
    node.depth = node.up.depth + 1;
  }
  const root = nodes[0];
  const byTag = new Map(nodes.map((node) => [node.tag, node]));
  const path = [];
  for (let node = byTag.get(data.chosen); node; node = node.up) path.unshift(node);
  const onPath = new Set(path);

  const shown = (text) => text.replace(INVISIBLE, (mark) => "⟦U+" + hex(mark) + "⟧");
  const hex = (mark) => mark.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  const decimals = (value, count) => (value === null ? "–" : value.toFixed(count).replace("-", "−"));
  const sign = (node) => ({correct: "✓", wrong: "✗"})[node.verdict] || ({error: "!", answer: "=", root: "◆", too_deep: "↧",
    invalid: "∅"})[node.kind] || "·";
  function label(node) {
    if (node.kind === "root") return "the problem";
    if (node.kind === "answer") return "answer " + shown(node.answer === null ? "–" : node.answer);
    const lines = node.text.split("\n").map((line) => line.replace(/<\/?[a-z_]{1,24}>/g, "").trim()).filter(Boolean);
    const line = lines.find((found) => found.startsWith("#")) || lines[0] || "(nothing)";
    return shown(line.slice(0, 160).replace(/^#\s*/, ""));
  }

  // --- the rows in sight -----------------------------------------------------------------------------------------
  const tree = byId("tree"), rows = byId("rows"), pool = [];
  let visible = [], places = new Map(), active = root, matches = [], matched = new Set();

  function list() {
    visible = [];
    const stack = [root];
    while (stack.length) {
      const node = stack.pop();
      visible.push(node);
      if (node.open) for (let i = node.children.length - 1; i >= 0; i--) stack.push(node.children[i]);
    }
    places = new Map(visible.map((node, place) => [node, place]));
    rows.style.height = visible.length * ROW + "px";
  }
  function element(tag, className, parent) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (parent) parent.append(made);
    return made;
  }
  function newRow() {
    const row = element("div", "row", rows);
    row.setAttribute("role", "treeitem");
    const name = element("span", "name", row);
    const parts = {row, name, caret: element("span", "caret", name), sign: element("span", "sign", name),
      label: element("span", "label", name)};
    const bar = element("span", "bar", row);
    parts.fill = element("i", "", element("span", "track", bar));
    parts.q = element("span", "number", bar);
    for (const column of ["visits", "prior", "score", "logp"]) parts[column] = element("span", "number", row);
    row.addEventListener("click", (event) => {
      if (event.target === parts.caret || parts.node === active) fold(parts.node, !parts.node.open);
      select(parts.node);
    });
    return parts;
  }
  function fill(bar, q) {
    const share = Math.min(1, Math.abs(q)) * 50;
    bar.style.width = share + "%";
    bar.style.left = (q < 0 ? 50 - share : 50) + "%";
    bar.style.background = q < 0 ? "var(--bad)" : "var(--good)";
  }
  function draw() {
    const first = Math.max(0, Math.floor(tree.scrollTop / ROW) - SPARE);
    const last = Math.min(visible.length, Math.ceil((tree.scrollTop + tree.clientHeight) / ROW) + SPARE);
    while (pool.length < last - first) pool.push(newRow());
    pool.forEach((parts, slot) => {
      const node = visible[first + slot];
      if (!node || first + slot >= last) { parts.row.id = ""; parts.row.style.display = "none"; return; }
      const {row} = parts;
      parts.node = node;
      row.style.display = "";
      row.style.transform = `translateY(${(first + slot) * ROW}px)`;
      row.id = "node-" + node.index;
      row.className = `row kind-${node.kind} verdict-${node.verdict || "none"}` + (onPath.has(node) ? " path" : "") +
        (node === active ? " active" : "") + (node.visits ? "" : " unvisited") + (matched.has(node) ? " hit" : "");
      row.setAttribute("aria-level", node.depth + 1);
      row.setAttribute("aria-setsize", node.up ? node.up.children.length : 1);
      row.setAttribute("aria-posinset", node.up ? node.place : 1);
      row.setAttribute("aria-selected", node === active);
      if (node.children.length) row.setAttribute("aria-expanded", node.open);
      else row.removeAttribute("aria-expanded");
      parts.name.style.setProperty("--depth", node.depth);
      parts.caret.textContent = node.children.length ? (node.open ? "▾" : "▸") : "";
      parts.sign.textContent = sign(node);
      parts.label.textContent = label(node) + (onPath.has(node) && node === path[path.length - 1] ? "  (chosen)" : "");
      fill(parts.fill, node.q);
      parts.q.textContent = node.visits ? decimals(node.q, 2) : "–";
      parts.visits.textContent = node.visits;
      parts.prior.textContent = decimals(node.prior, 2);
      parts.score.textContent = decimals(node.score, 2);
      parts.logp.textContent = decimals(node.logp, 1);
    });
    tree.setAttribute("aria-activedescendant", "node-" + active.index);
  }

  // --- moving ----------------------------------------------------------------------------------------------------
  function fold(node, open) {
    if (!node.children.length || node.open === open) return;
    node.open = open;
    if (!open) for (let up = active.up; up; up = up.up) if (up === node) active = node;
    list();
  }
  function reveal(node) {
    let changed = false;
    for (let up = node.up; up; up = up.up) if (!up.open) { up.open = true; changed = true; }
    if (changed) list();
  }
  function select(node) {
    if (!node) return;
    reveal(node);
    const moved = node !== active;
    active = node;
    const top = places.get(node) * ROW;
    if (top < tree.scrollTop) tree.scrollTop = top;
    else if (top + ROW > tree.scrollTop + tree.clientHeight) tree.scrollTop = top + ROW - tree.clientHeight;
    draw();
    if (moved || !byId("detail").firstChild) detail(node);
    mark();
  }
  const step = (by) => visible[Math.max(0, Math.min(visible.length - 1, places.get(active) + by))];
  const sibling = (by) => active.up && active.up.children[active.place - 1 + by];
  function alongPath(by) {
    if (!path.length) return say("this search chose no answer");
    let base = active;
    while (base && !onPath.has(base)) base = base.up;  // off the path: from where this branch left it
    const off = base !== active && by > 0 ? 0 : by;
    select(path[Math.max(0, Math.min(path.length - 1, path.indexOf(base || root) + off))]);
  }
  function toPath() {
    for (const node of nodes) node.open = false;
    const open = path.length ? path.slice(0, -1) : [root];
    for (const node of open) node.open = true;
    list();
    select(path.length ? path[0] : root);
  }
  function unfoldAll() {
    for (const node of nodes) node.open = node.children.length > 0;
    list();
    select(active);
  }
  const page = () => Math.max(1, Math.floor(tree.clientHeight / ROW) - 1);
  const KEYS = {
    ArrowDown: (event) => select(event.shiftKey ? sibling(1) : step(1)),
    ArrowUp: (event) => select(event.shiftKey ? sibling(-1) : step(-1)),
    ArrowRight: () => { if (active.children.length && active.open) select(active.children[0]); else { fold(active, true); draw(); } },
    ArrowLeft: () => { if (active.children.length && active.open) { fold(active, false); draw(); } else select(active.up); },
    Home: () => select(visible[0]),
    End: () => select(visible[visible.length - 1]),
    PageDown: () => select(step(page())),
    PageUp: () => select(step(-page())),
    Enter: () => { fold(active, !active.open); draw(); },
    " ": () => { fold(active, !active.open); draw(); },
    "*": () => { for (const node of active.up ? active.up.children : [root]) fold(node, true); draw(); },
    c: () => alongPath(1), C: () => alongPath(-1),
    n: () => nextMatch(1), N: () => nextMatch(-1),
    p: toPath, u: unfoldAll,
  };
  tree.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key](event);
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT" || byId("help").open || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); search.focus(); search.select(); }
    else if (event.key === "?") byId("help").showModal();
    else if ("cC".includes(event.key) && event.target !== tree) { tree.focus(); KEYS[event.key](event); }
  });
  tree.addEventListener("scroll", draw, {passive: true});
  byId("button-path").addEventListener("click", () => { toPath(); tree.focus(); });
  byId("button-next").addEventListener("click", () => alongPath(1));
  byId("button-all").addEventListener("click", () => { unfoldAll(); tree.focus(); });
  byId("button-help").addEventListener("click", () => byId("help").showModal());
  window.addEventListener("hashchange", () => select(byTag.get(location.hash.slice(1))));

  // --- search ----------------------------------------------------------------------------------------------------
  const search = byId("search");
  const say = (text) => { byId("found").textContent = text; };
  function find() {
    const wanted = search.value.toLowerCase();
    matches = wanted ? nodes.filter((node) => (node.haystack ??= [node.tag, node.text, node.answer, node.output, node.error]
      .join("\n").toLowerCase()).includes(wanted)) : [];
    matched = new Set(matches);
    say(wanted ? `${matches.length} found` : "");
    draw();
  }
  function nextMatch(by) {
    if (!matches.length) return;
    const at = matches.indexOf(active);
    const next = at < 0 ? (by > 0 ? matches.findIndex((node) => node.index > active.index) : matches.length - 1)
      : (at + by + matches.length) % matches.length;
    select(matches[Math.max(0, next)]);
    say(`${Math.max(0, next) + 1} of ${matches.length}`);
  }
  search.addEventListener("input", find);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") nextMatch(event.shiftKey ? -1 : 1);
    else if (event.key === "Escape") tree.focus();
    else return;
    event.preventDefault();
  });

  // --- one node --------------------------------------------------------------------------------------------------
  function write(parent, text) {  // hidden and reordering characters stand as their numbers
    let from = 0;
    for (const found of text.matchAll(INVISIBLE)) {
      parent.append(text.slice(from, found.index));
      element("span", "t-hidden", parent).textContent = "U+" + hex(found[0]);
      from = found.index + 1;
    }
    parent.append(text.slice(from));
  }
  function code(parent, text) {
    if (text.length > HIGHLIGHTED) return write(parent, text);
    let from = 0;
    for (const found of text.matchAll(TOKENS)) {
      write(parent, text.slice(from, found.index));
      write(element("span", CLASSES[found.slice(1).findIndex((group) => group !== undefined)], parent), found[0]);
      from = found.index + found[0].length;
    }
    write(parent, text.slice(from));
  }
  function block(parent, title, text, className, how) {
    element("h3", "", parent).textContent = title;
    how(element("pre", className, parent), text);
  }
  function detail(node) {
    const box = document.createDocumentFragment();
    const head = element("h2", "", box);
    element("span", "", head).textContent = node.kind === "root" ? "The problem" :
      (node.kind === "answer" ? "Answer at depth " : "Step ") + node.depth;
    if (node.verdict) {
      const badge = element("span", "badge " + ({correct: "right", wrong: "wrong"}[node.verdict] || ""), head);
      badge.textContent = ({correct: "✓ ", wrong: "✗ "}[node.verdict] || "") + node.verdict.replace("_", " ");
    }
    if (!["open", "root", "answer"].includes(node.kind)) element("span", "badge wrong", head).textContent = node.kind.replace("_", " ");
    if (onPath.has(node)) element("span", "badge", head).textContent = "on the chosen path";
    const crumbs = element("nav", "crumbs", box);
    crumbs.setAttribute("aria-label", "Path from the root");
    const up = [];
    for (let other = node; other; other = other.up) up.unshift(other);
    for (const other of up) {
      const link = element("a", "", crumbs);
      link.href = "#" + encodeURIComponent(other.tag);
      link.textContent = other.up ? "› " + other.tag.slice(other.up.tag.length + 1) : other.tag;
      if (other === node) link.setAttribute("aria-current", "true");
    }
    const facts = [["Q-value", node.visits ? decimals(node.q, 3) : "not visited"], ["visits", node.visits],
      ["prior", decimals(node.prior, 3)], ["PPM score", decimals(node.score, 3)], ["log-prob", decimals(node.logp, 2)],
      ["log-prob a token", node.written ? decimals(node.logp === null ? null : node.logp / node.written, 3) : "–"],
      ["tokens", `${node.written} + ${node.appended}`], ["children", node.children.length]];
    if (node.status) facts.push(["sandbox", node.status]);
    if (node.errors) facts.push(["errors in a row", node.errors]);
    if (node.kind === "answer") facts.push(["answer", node.answer === null ? "–" : shown(node.answer)]);
    const grid = element("dl", "", box);
    for (const [name, value] of facts) {
      const cell = element("div", "", grid);
      element("dt", "", cell).textContent = name;
      element("dd", "", cell).textContent = value;
    }
    if (node.text) block(box, "what the policy wrote, and what was appended", node.text.replace(/^\n+|\s+$/g, ""), "", code);
    if (node.output) block(box, "output", node.output, "", write);
    if (node.error) block(box, "error", node.error, "error", write);
    byId("detail").replaceChildren(box);
    byId("detail").scrollTop = 0;
  }

  // --- the whole tree, small -------------------------------------------------------------------------------------
  const map = byId("map"), canvas = map.querySelector("canvas"), here = byId("here");
  let leaves = 0, depths = 1;
  for (const node of nodes) depths = Math.max(depths, node.depth);
  (function lay() {
    const order = [], stack = [root];
    while (stack.length) { const node = stack.pop(); order.push(node); for (let i = node.children.length - 1; i >= 0; i--) stack.push(node.children[i]); }
    for (const node of order) if (!node.children.length) node.x = leaves++;
    for (const node of order.reverse()) if (node.children.length) node.x = (node.children[0].x + node.children[node.children.length - 1].x) / 2;
  })();
  const mapX = (node) => 12 + (map.clientWidth - 24) * (leaves > 1 ? node.x / (leaves - 1) : 0.5);
  const mapY = (node) => 10 + (map.clientHeight - 20) * (node.depth / depths);
  function mark() { here.style.left = mapX(active) + "px"; here.style.top = mapY(active) + "px"; }
  function paint() {
    const scale = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const [line, good, bad, accent] = ["--muted", "--good", "--bad", "--path"].map(colour);
    canvas.width = map.clientWidth * scale;
    canvas.height = map.clientHeight * scale;
    pen.scale(scale, scale);
    const edges = (list_, stroke, width, alpha) => {
      pen.strokeStyle = stroke; pen.lineWidth = width; pen.globalAlpha = alpha;
      pen.beginPath();
      for (const node of list_) if (node.up) { pen.moveTo(mapX(node.up), mapY(node.up)); pen.lineTo(mapX(node), mapY(node)); }
      pen.stroke();
    };
    const inner = nodes.filter((node) => !onPath.has(node));
    edges(inner.filter((node) => !node.visits), line, 0.6, 0.35);
    edges(inner.filter((node) => node.visits && node.q < 0), bad, 1, 0.6);
    edges(inner.filter((node) => node.visits && node.q >= 0), good, 1, 0.6);
    edges(path, accent, 3, 1);
    pen.globalAlpha = 1;
    for (const node of nodes) {
      if (node.kind !== "answer") continue;
      pen.fillStyle = node.verdict === "correct" ? good : node.verdict === "wrong" ? bad : line;
      pen.beginPath(); pen.arc(mapX(node), mapY(node), onPath.has(node) ? 5 : 2.6, 0, 7); pen.fill();
    }
    mark();
  }
  map.addEventListener("click", (event) => {
    const box = map.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const away = (node) => (mapX(node) - x) ** 2 + (mapY(node) - y) ** 2;
    select(nodes.reduce((best, node) => (away(node) < away(best) ? node : best), root));
  });
  new ResizeObserver(() => { draw(); paint(); }).observe(map);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

  toPath();
  select(byTag.get(location.hash.slice(1)) || active);
  tree.focus({preventScroll: true});
})();
