// The explorer's view, read after pair.js. A question goes to the kernel as `ask`, and its reply comes back as `answer`.
const HEADS = ["alignment", "matching", "two-stage"];

// A head's ranking: its pictures in order, each a button that chooses it.
function ranking(found, answer, choose) {
  const hits = found.hits.map((hit, place) => {
    const chosen = hit.id === answer.image, url = answer.pictures[hit.id];
    const picture = url ? node("img", { src: url, alt: `picture ${hit.id}` }) : node("span", { class: "al-none" }, hit.id);
    return node("li", {}, node("button", {
      type: "button", class: "al-hit" + (chosen ? " al-chosen" : ""), "data-image": hit.id,
      "aria-pressed": String(chosen), title: `picture ${hit.id}, rank ${place + 1}`, onclick: () => choose(hit.id),
    }, picture, node("small", {}, hit.score.toFixed(2) + (hit.own ? " ✓" : ""))));
  });
  const title = node("h2", {}, found.head, node("small", {}, ` ${found.milliseconds.toFixed(0)} ms`));
  return node("section", { class: "al-head", "data-head": found.head }, title, node("ol", {}, ...hits));
}

// The captions that the chosen picture finds, each a button that searches for it.
function captions(answer, choose) {
  const rows = answer.captions.map(c => node("li", {},
    node("button", {
      type: "button", class: "al-caption" + (c.text === answer.query ? " al-chosen" : ""), onclick: () => choose(c.text),
    }, c.text), node("small", {}, ` ${c.score.toFixed(2)}${c.own ? " ✓" : ""}`)));
  const time = node("small", {}, ` ${answer.captions_milliseconds.toFixed(0)} ms`);
  return node("section", { class: "al-captions" }, node("h2", {}, `captions of picture ${answer.image}`, time),
    node("ol", {}, ...rows));
}

function render({ model, el }) {
  const typed = node("input", {
    type: "search", class: "al-query", "aria-label": "caption", autocomplete: "off",
    placeholder: "type a caption, such as: a red fish above a green cactus", list: `al-${model.model_id ?? Math.random()}`,
  });
  const list = node("datalist", { id: typed.getAttribute("list") });
  const shown = model.get("ask").heads ?? HEADS;
  const heads = HEADS.map(head => node("input", { type: "checkbox", value: head, checked: shown.includes(head) }));
  const body = node("div", { class: "al-body", "aria-busy": "false" });

  function ask(change) {
    const now = model.get("ask"), chosen = heads.filter(h => h.checked).map(h => h.value);
    body.setAttribute("aria-busy", "true");
    model.set("ask", { query: now.query, image: "", pick: "", ...change, heads: chosen, number: (now.number ?? 0) + 1 });
    model.save_changes();
  }

  function show() {
    const answer = model.get("answer");
    if (answer.query !== undefined) typed.value = answer.query;
    body.replaceChildren();
    body.setAttribute("aria-busy", "false");
    body.dataset.number = answer.number ?? "";
    if (answer.error) {
      body.append(node("p", { class: "al-error", role: "alert" }, answer.error));
      return;
    }
    const choose = image => ask({ query: answer.query, image }), picture = answer.pictures?.[answer.image];
    if (answer.rankings?.length)
      body.append(node("div", { class: "al-heads" }, ...answer.rankings.map(r => ranking(r, answer, choose))));
    if (answer.pair) body.append(pairView({ ...answer.pair, picture }));
    else if (answer.image && picture)
      body.append(node("div", { class: "al-alone" }, node("img", { src: picture, alt: `picture ${answer.image}` })));
    if (answer.captions?.length) body.append(captions(answer, query => ask({ query, image: answer.image })));
    if (answer.note) body.append(node("p", { class: "al-note" }, answer.note));
  }

  // JupyterLab and the list of suggestions both want the Enter key: ask when they are done with it.
  typed.addEventListener("keydown", e => {
    if (e.key !== "Enter") return;
    e.stopPropagation();
    setTimeout(() => ask({ query: typed.value }));
  });
  const send = () => { model.set("typed", typed.value); model.save_changes(); };
  let wait;
  typed.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(send, 150); });
  const suggest = () => list.replaceChildren(...model.get("suggestions").map(text => node("option", { value: text })));
  model.on("change:answer", show);
  model.on("change:suggestions", suggest);
  const again = () => model.get("answer").query && ask({ image: model.get("answer").image });
  heads.forEach(h => h.addEventListener("change", again));
  const button = (name, text, onclick) => node("button", { type: "button", class: name, onclick }, text);
  const form = node("form", { class: "al-form", onsubmit: e => e.preventDefault() }, typed, list,
    button("al-search", "Search", () => ask({ query: typed.value })),
    button("al-pick-caption", "A caption of the set", () => ask({ pick: "caption" })),
    button("al-pick-picture", "A picture of the set", () => ask({ pick: "picture" })),
    node("fieldset", {}, node("legend", {}, "rank by"), ...heads.map((h, i) => node("label", {}, h, HEADS[i]))));
  el.classList.add("al-explorer");
  el.append(form, body);
  suggest();
  show();
  return () => { model.off("change:answer", show); model.off("change:suggestions", suggest); };
}

export default { render };
