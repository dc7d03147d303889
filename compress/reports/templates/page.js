"use strict";
// Rows of long tables by a part of their text.
for (const input of document.querySelectorAll(".filter input")) {
  const rows = input.closest(".filter").nextElementSibling.querySelectorAll("tbody tr");
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

for (const graph of document.querySelectorAll(".graph")) {
  const view = graph.querySelector(".view"), map = graph.querySelector(".map");
  const told = graph.querySelector(".told"), find = graph.querySelector(".find input");
  const data = JSON.parse(graph.querySelector(".map-data").textContent);
  const boxes = [...map.querySelectorAll(".box")], lines = [...map.querySelectorAll(".lines path")];
  const width = map.viewBox.baseVal.width, height = map.viewBox.baseVal.height;
  const byName = new Map();  // layers; of several calls the first
  data.boxes.forEach((box, at) => { if (box.layer && !byName.has(box.name)) byName.set(box.name, at); });
  const hint = told.textContent, together = data.groups.map(names => new Set(names));
  let scale = 1, chosen = -1;

  // The point of the map that is at (x, y) of the view stays there.
  function zoom(to, x = view.clientWidth / 2, y = view.clientHeight / 2) {
    const before = map.getBoundingClientRect(), frame = view.getBoundingClientRect();
    const across = (x + frame.left - before.left) / scale, down = (y + frame.top - before.top) / scale;
    scale = Math.min(Math.max(to, Math.min(whole(), .1)), 8);
    map.setAttribute("width", width * scale);
    map.setAttribute("height", height * scale);
    const after = map.getBoundingClientRect();
    view.scrollLeft += after.left + across * scale - (x + frame.left);
    view.scrollTop += after.top + down * scale - (y + frame.top);
  }
  const whole = () => Math.min(view.clientWidth / width, view.clientHeight / height);
  const fit = () => Math.min(view.clientWidth / width, 1);
  const acts = {
    in: () => zoom(scale * 1.3), out: () => zoom(scale / 1.3),
    whole: () => zoom(whole()), width: () => zoom(fit()),
  };
  for (const button of graph.querySelectorAll("[data-zoom]"))
    button.addEventListener("click", () => acts[button.dataset.zoom]());
  view.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const frame = view.getBoundingClientRect();
    zoom(scale * Math.exp(-event.deltaY / 300), event.clientX - frame.left, event.clientY - frame.top);
  }, {passive: false});

  // One pointer that is a mouse drags; two fingers zoom; one finger scrolls as everywhere.
  const pointers = new Map();
  let apart = 0, moved = false;
  const distance = () => {
    const [a, b] = [...pointers.values()];
    return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
  };
  view.addEventListener("pointerdown", event => {
    pointers.set(event.pointerId, event);
    moved = false;
    if (pointers.size === 2) apart = distance();
  });
  addEventListener("pointermove", event => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    pointers.set(event.pointerId, event);
    if (pointers.size === 2) {
      const now = distance(), [a, b] = [...pointers.values()], frame = view.getBoundingClientRect();
      zoom(scale * now / apart, (a.clientX + b.clientX) / 2 - frame.left, (a.clientY + b.clientY) / 2 - frame.top);
      apart = now;
    } else if (event.pointerType === "mouse" && event.buttons & 1) {
      view.scrollLeft -= event.clientX - before.clientX;
      view.scrollTop -= event.clientY - before.clientY;
      moved ||= Math.abs(event.movementX) + Math.abs(event.movementY) > 2;
      view.classList.toggle("dragged", moved);
    }
  });
  for (const end of ["pointerup", "pointercancel"])
    addEventListener(end, event => { pointers.delete(event.pointerId); view.classList.remove("dragged"); });

  // What goes with a box: its group, or what it comes from and goes to.
  function light(index) {
    const box = data.boxes[index];
    map.classList.toggle("some", index >= 0);
    boxes.forEach((each, at) => each.classList.toggle("near", !!box && (at === index
      || box.group > 0 && together[box.group - 1].has(data.boxes[at].name)
      || box.next.includes(at) || data.boxes[at].next.includes(index))));
    for (const line of lines)
      line.classList.toggle("near", +line.dataset.from === index || +line.dataset.to === index);
  }
  function choose(index, move = true) {
    boxes[chosen]?.classList.remove("chosen");
    chosen = index;
    light(index);
    if (index < 0) { told.replaceChildren(text("p", hint)); return; }
    boxes[index].classList.add("chosen");
    boxes.forEach((box, at) => box.setAttribute("tabindex", at === index ? "0" : "-1"));
    if (move) boxes[index].scrollIntoView({block: "nearest", inline: "nearest"});
    describe(index);
  }
  function text(tag, content) {
    const made = document.createElement(tag);
    made.textContent = content;
    return made;
  }
  function list(heading, found) {  // of [name, number of its box or undefined]
    if (!found.length) return [];
    const items = document.createElement("ul");
    for (const [name, at] of found) {
      const item = document.createElement("li");
      const link = text(at === undefined ? "span" : "button", name);
      if (at !== undefined) link.addEventListener("click", () => { choose(at); center(at); });
      item.append(link);
      items.append(item);
    }
    return [text("p", heading), items];
  }
  function describe(index) {
    const box = data.boxes[index], parts = [text("h3", box.name)];
    if (box.units) parts.push(text("p", `${box.units} channels, ${box.left} left`));
    if (box.group) {
      const others = data.groups[box.group - 1].filter(name => name !== box.name);
      parts.push(...list(`Coupled (G${box.group}): goes together with`, others.map(name => [name, byName.get(name)])));
    } else if (box.layer) parts.push(text("p", "Coupled with no other layer."));
    if (box.held) parts.push(text("p", `Nothing of it can go: it ${box.held}`));
    if (box.why) parts.push(text("p", `Masked, but kept: ${box.why}`));
    parts.push(...list("Its output goes to", box.next.map(at => [data.boxes[at].name, at])));
    told.replaceChildren(...parts);
  }
  function center(index) {
    boxes[index].scrollIntoView({block: "center", inline: "center"});
  }
  boxes.forEach((box, index) => {
    box.addEventListener("click", () => { if (!moved) choose(index, false); });
    box.addEventListener("pointerenter", () => { if (chosen < 0) { light(index); describe(index); } });
    box.addEventListener("pointerleave", () => { if (chosen < 0) choose(-1); });
  });
  find.addEventListener("change", () => {
    const at = byName.get(find.value);
    if (at !== undefined) { choose(at); center(at); }
  });
  view.addEventListener("keydown", event => {
    const key = event.key;
    const at = boxes.indexOf(document.activeElement);
    const next = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[key];
    if (key === "+" || key === "=") acts.in();
    else if (key === "-") acts.out();
    else if (key === "0") acts.width();
    else if (key === "Escape") choose(-1);
    else if ((key === "Enter" || key === " ") && at >= 0) choose(at);
    else if (next && at >= 0) {
      const to = Math.min(Math.max(at + next, 0), boxes.length - 1);
      choose(to);
      boxes[to].focus();
    } else return;
    event.preventDefault();
  });
  boxes[0]?.setAttribute("tabindex", "0");
  zoom(fit());
  view.scrollTop = 0;
}
