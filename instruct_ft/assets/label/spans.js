// The span widget. It shows a text and turns keys and selections into messages; what they mean, and what is
// saved, is decided in Python (instruct_ft.data.label.SpanSession). Offsets here are UTF-16 units, as in all of
// JavaScript; Python counts code points and converts.

// Words (by = "word") or visible characters (by = "grapheme") of a text as [start, end]; white space left out
export function units(text, by) {
  const found = new Intl.Segmenter(undefined, { granularity: by }).segment(text);
  return Array.from(found, (s) => [s.index, s.index + s.segment.length])
    .filter(([start, end]) => text.slice(start, end).trim());
}

// The selection after an arrow key: by word, or by character with Alt; with Shift its end moves
export function move(text, [start, end], { key, shiftKey, altKey }) {
  const all = units(text, altKey ? "grapheme" : "word");
  const stay = [start, end];
  if (key === "ArrowRight") {
    const next = all.find((u) => u[0] >= end);
    return next ? [shiftKey && end > start ? start : next[0], next[1]] : stay;
  }
  if (!shiftKey) return all.findLast((u) => u[1] <= start) ?? stay;
  const shorter = all.findLast((u) => u[1] > start && u[1] < end);
  return shorter ? [start, shorter[1]] : stay;
}

// A selection widened to whole visible characters and without white space at its ends; null if nothing is left
export function snap(text, [start, end]) {
  const whole = units(text, "grapheme").filter((u) => u[1] > start && u[0] < end);
  return whole.length ? [whole[0][0], whole.at(-1)[1]] : null;
}

// The text cut wherever a span or the selection begins or ends
export function pieces(text, spans, [start, end]) {
  const cuts = [0, text.length, start, end, ...spans.flatMap((s) => [s.start, s.end])];
  const at = [...new Set(cuts)].sort((a, b) => a - b);
  return at.slice(1).map((to, i) => {
    const span = spans.find((s) => s.start <= at[i] && to <= s.end);
    const picked = start <= at[i] && to <= end;
    return { text: text.slice(at[i], to), picked, label: span?.label, last: span?.end === to };
  });
}

// Where a DOM range begins and ends in the text of `root`
export function offsets(root, range) {
  const before = range.cloneRange();
  before.selectNodeContents(root);
  before.setEnd(range.startContainer, range.startOffset);
  const start = before.toString().length;
  return [start, start + range.toString().length];
}

const CSS = `.ft-spans { border: 1px solid #999; padding: 8px; line-height: 2; outline-offset: 2px }
.ft-spans .text { white-space: pre-wrap; font-size: 16px }
.ft-spans mark { background: var(--hue); color: #000; padding: 2px 0 }
.ft-spans mark[data-label]::after { content: attr(data-label); font-size: 10px; margin: 0 2px }
.ft-spans .picked { outline: 2px solid #06c }
.ft-spans .keys, .ft-spans .status { font-size: 12px; color: #555 }`;

const node = (tag, name, text = "") =>
  Object.assign(document.createElement(tag), { className: name, textContent: text });

function render({ model, el }) {
  const [box, text, keys, status] = ["ft-spans", "text", "keys", "status"].map((n) => node("div", n));
  box.tabIndex = 0;
  box.dataset.lmSuppressShortcuts = "true"; // JupyterLab leaves our keys alone
  box.append(text, keys, status);
  el.append(node("style", "", CSS), box);
  let selection = [0, 0], shown = null;

  const draw = () => {
    const view = model.get("view");
    if (view.id !== shown) [selection, shown] = [[0, 0], view.id];
    const hue = Object.fromEntries(view.keys.map((k) => [k.label, k.colour]));
    text.replaceChildren(...pieces(view.text, view.spans, selection).map((piece) => {
      const part = node(piece.label ? "mark" : "span", piece.picked ? "picked" : "", piece.text);
      if (piece.label) part.style.setProperty("--hue", hue[piece.label]);
      if (piece.last) part.dataset.label = piece.label; // drawn by CSS: it is not part of the text
      return part;
    }));
    keys.textContent = view.keys.map((k) => `${k.key} ${k.label}`).join("   ") + "   " + view.help;
    status.textContent = view.status;
  };
  const pick = (chosen) => { if (chosen) selection = chosen; draw(); };

  box.addEventListener("keydown", (e) => {
    const view = model.get("view");
    const key = (e.ctrlKey || e.metaKey) && e.key === "z" ? "u" : e.key;
    const ours = key === "u" || !(e.ctrlKey || e.metaKey || e.altKey);
    if (key === "ArrowLeft" || key === "ArrowRight") pick(move(view.text, selection, e));
    else if (ours && (key.length === 1 || key === "Enter" || key === "Backspace"))
      model.send({ id: view.id, key, start: selection[0], end: selection[1] });
    else return;
    e.preventDefault();
    e.stopPropagation();
  });
  text.addEventListener("mouseup", () => {
    const chosen = document.getSelection();
    if (chosen.rangeCount && !chosen.isCollapsed)
      pick(snap(model.get("view").text, offsets(text, chosen.getRangeAt(0))));
    box.focus();
  });
  model.on("change:view", draw);
  draw();
}

export default { render };
