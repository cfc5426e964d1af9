// The explorer's view. A question goes to the kernel as `ask`, what it finds comes back as `answer`; lighting up words and regions needs no kernel.
const HEADS = ["alignment", "matching", "two-stage"];

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter(c => c !== null && c !== undefined));
  return made;
}

const percent = value => `${(100 * value).toFixed(2)}%`;
const plain = word => word.replace(/^##/, "");

// One picture and one text: words above, regions over the picture. `pair` is what `explain` in the room returns, with the picture's address.
export function pairView(pair, start = null) {
  const lit = { word: null, region: null };
  const picture = node("div", { class: "al-picture", style: pair.picture ? `background-image:url("${pair.picture}")` : "" });
  if (pair.ratio) picture.style.aspectRatio = pair.ratio;
  const says = node("p", { class: "al-says", "aria-live": "polite" });
  const regions = pair.regions.map((region, r) => {
    const [x1, y1, x2, y2] = region.box, width = Math.max(x2 - x1, .001), height = Math.max(y2 - y1, .001);
    const button = node("button", { type: "button", class: "al-region", "data-region": r, "aria-pressed": "false", "aria-label": `region ${r + 1}${region.tag ? `, ${region.tag}` : ""}`, title: region.tag ?? `region ${r + 1}`,
      style: `left:${percent(x1)};top:${percent(y1)};width:${percent(width)};height:${percent(height)};z-index:${Math.round(1000 * (1 - width * height))}`,
      onclick: () => light({ region: lit.region === r ? null : r }) });
    if (pair.picture) button.append(node("span", { class: "al-colour", style: `background-image:url("${pair.picture}");background-size:${percent(1 / width)} ${percent(1 / height)};` +
      `background-position:${percent(width < .999 ? x1 / (1 - width) : 0)} ${percent(height < .999 ? y1 / (1 - height) : 0)}` }));
    button.append(node("span", { class: "al-label" }));
    picture.append(button);
    return button;
  });
  const most = Math.max(.01, ...pair.words.map(w => Math.abs(w.score)));
  const words = pair.words.map((word, w) => node("button", { type: "button", class: "al-word" + (word.text.startsWith("##") ? " al-piece" : ""), "data-word": w, "aria-pressed": "false",
    title: `${plain(word.text)}: adds ${word.score.toFixed(2)}`, onclick: () => light({ word: lit.word === w ? null : w }) },
    node("span", { class: "al-name" }, plain(word.text)), node("span", { class: "al-bar" }, node("i", { class: word.score < 0 ? "al-minus" : "", style: `height:${percent(Math.abs(word.score) / most)}` })), node("small", {}, word.score.toFixed(2))));

  function light({ word = null, region = null }) {
    lit.word = word; lit.region = region;
    words.forEach((b, w) => {
      const share = region === null ? 0 : Math.max(0, pair.cosines[region][w]);
      b.setAttribute("aria-pressed", word === w);
      b.style.setProperty("--share", share.toFixed(3));
      b.classList.toggle("al-lit", region !== null && pair.words[w].region === region);
    });
    const best = word === null ? null : pair.words[word].region;
    regions.forEach((b, r) => {
      const cosine = word === null ? 0 : pair.cosines[r][word], top = word === null || best === null ? 1 : Math.max(.01, pair.cosines[best][word]);
      b.setAttribute("aria-pressed", region === r);
      b.style.setProperty("--share", word === null ? 0 : Math.max(0, Math.min(1, cosine / top)).toFixed(3));
      b.classList.toggle("al-best", word !== null && r === best);
      b.classList.toggle("al-chosen", region === r);
      b.querySelector(".al-label").textContent = word !== null ? `${pair.regions[r].tag ?? ""} ${cosine.toFixed(2)}` : region === r ? pair.regions[r].tag ?? "" : "";
    });
    picture.classList.toggle("al-dim", word !== null || region !== null);
    const nearest = r => { const w = pair.cosines[r].indexOf(Math.max(...pair.cosines[r])); return w < 0 ? "none" : `“${plain(pair.words[w].text)}”, cosine ${pair.cosines[r][w].toFixed(2)}`; };
    const tag = r => pair.regions[r].tag ?? `region ${r + 1}`;
    says.textContent = word !== null ? (best === null ? "" : `“${plain(pair.words[word].text)}” points at ${tag(best)}, cosine ${pair.cosines[best][word].toFixed(2)}, and adds ${pair.words[word].score.toFixed(2)} to the score.`)
      : region !== null ? `${tag(region)} is the best region of ${pair.words.filter(w => w.region === region).map(w => `“${plain(w.text)}”`).join(", ") || "no word"}; nearest to it is ${nearest(region)}.`
      : "Choose a word to see its regions, or a region to see its words.";
  }

  const sum = node("p", { class: "al-sum" }, node("b", {}, `alignment score ${pair.score.toFixed(2)}`), ` ${pair.formula}`,
    pair.matching === undefined || pair.matching === null ? "" : `; matching score ${pair.matching.toFixed(2)}, one cosine of two vectors`);
  const view = node("div", { class: "al-pair" }, picture, node("div", { class: "al-explain" }, node("div", { class: "al-words", role: "group", "aria-label": "words" }, ...words), sum, says));
  light(start === null ? {} : { word: start });
  view.light = light;
  return view;
}

function ranking(found, answer, choose) {
  const hits = found.hits.map((hit, place) => node("li", {}, node("button", { type: "button", class: "al-hit" + (hit.id === answer.image ? " al-chosen" : ""), "data-image": hit.id, "aria-pressed": String(hit.id === answer.image),
    title: `picture ${hit.id}, rank ${place + 1}`, onclick: () => choose(hit.id) },
    answer.pictures[hit.id] ? node("img", { src: answer.pictures[hit.id], alt: `picture ${hit.id}` }) : node("span", { class: "al-none" }, hit.id),
    node("small", {}, hit.score.toFixed(2) + (hit.own ? " ✓" : "")))));
  return node("section", { class: "al-head", "data-head": found.head }, node("h2", {}, found.head, node("small", {}, ` ${found.milliseconds.toFixed(0)} ms`)), node("ol", {}, ...hits));
}

function captions(answer, choose) {
  const rows = answer.captions.map(c => node("li", {}, node("button", { type: "button", class: "al-caption" + (c.text === answer.query ? " al-chosen" : ""), onclick: () => choose(c.text) }, c.text), node("small", {}, ` ${c.score.toFixed(2)}${c.own ? " ✓" : ""}`)));
  return node("section", { class: "al-captions" }, node("h2", {}, `captions of picture ${answer.image}`, node("small", {}, ` ${answer.captions_milliseconds.toFixed(0)} ms`)), node("ol", {}, ...rows));
}

function render({ model, el }) {
  const typed = node("input", { type: "search", class: "al-query", "aria-label": "caption", placeholder: "type a caption, such as: a red fish above a green cactus", autocomplete: "off", list: `al-${model.model_id ?? Math.random()}` });
  const list = node("datalist", { id: typed.getAttribute("list") });
  const heads = HEADS.map(head => node("input", { type: "checkbox", value: head, checked: (model.get("ask").heads ?? HEADS).includes(head) }));
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
    if (answer.error) { body.append(node("p", { class: "al-error", role: "alert" }, answer.error)); return; }
    if (answer.rankings?.length) body.append(node("div", { class: "al-heads" }, ...answer.rankings.map(r => ranking(r, answer, image => ask({ query: answer.query, image })))));
    if (answer.pair) body.append(pairView({ ...answer.pair, picture: answer.pictures[answer.image] }));
    else if (answer.image && answer.pictures[answer.image]) body.append(node("div", { class: "al-alone" }, node("img", { src: answer.pictures[answer.image], alt: `picture ${answer.image}` })));
    if (answer.captions?.length) body.append(captions(answer, query => ask({ query, image: answer.image })));
    if (answer.note) body.append(node("p", { class: "al-note" }, answer.note));
  }

  // JupyterLab and the list of suggestions both want the Enter key: ask when they are done with it.
  typed.addEventListener("keydown", e => { if (e.key === "Enter") { e.stopPropagation(); setTimeout(() => ask({ query: typed.value })); } });
  let wait;
  typed.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(() => { model.set("typed", typed.value); model.save_changes(); }, 150); });
  const suggest = () => list.replaceChildren(...model.get("suggestions").map(text => node("option", { value: text })));
  model.on("change:answer", show);
  model.on("change:suggestions", suggest);
  heads.forEach(h => h.addEventListener("change", () => model.get("answer").query && ask({ image: model.get("answer").image })));
  const form = node("form", { class: "al-form", onsubmit: e => e.preventDefault() }, typed, list, node("button", { type: "button", class: "al-search", onclick: () => ask({ query: typed.value }) }, "Search"),
    node("button", { type: "button", class: "al-pick-caption", onclick: () => ask({ pick: "caption" }) }, "A caption of the set"),
    node("button", { type: "button", class: "al-pick-picture", onclick: () => ask({ pick: "picture" }) }, "A picture of the set"),
    node("fieldset", {}, node("legend", {}, "rank by"), ...heads.map((h, i) => node("label", {}, h, HEADS[i]))));
  el.classList.add("al-explorer");
  el.append(form, body);
  suggest();
  show();
  return () => { model.off("change:answer", show); model.off("change:suggestions", suggest); };
}

export default { render };
