/*
 * The parts of the opened panel that show figures: device memory, the pass against its limits, the table, advice, messages.
 *
 * Each maker returns {root, update(status)}: elements are made once and only their text and widths change, so that nothing jumps, a
 * selection is kept, and the WebUI, which watches for added nodes, is left alone.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    const h = (...given) => ours.element(...given);
    const heading = (text) => h("h4", {className: "alv-heading"}, [text]);

    /** The bar: parts side by side, a mark where the budget ends, a legend with the sizes. */
    ours.vramSection = function() {
        const {t} = ours;
        const ids = ["resident", "ring", "activations", "others", "free"];
        const parts = Object.fromEntries(ids.map((id) => [id, h("span", {className: "alv-part", "data-part": id})]));
        const mark = h("span", {className: "alv-budget", title: t("budget for weights")});
        const bar = h("div", {className: "alv-bar", role: "meter", "aria-label": "VRAM", "aria-valuemin": "0", "aria-valuemax": "100"},
            [...Object.values(parts), mark]);
        const sizes = Object.fromEntries(ids.map((id) => [id, h("span", {className: "alv-size"})]));
        const labels = Object.fromEntries(ids.map((id) => [id, h("span", {})]));
        const swatch = (id) => h("span", {className: "alv-swatch", "data-part": id, "aria-hidden": "true"});
        const legend = h("ul", {className: "alv-legend"}, ids.map((id) => h("li", {}, [swatch(id), labels[id], sizes[id]])));
        const budget = h("span", {className: "alv-size"});
        const budgetItem = h("li", {}, [swatch("budget"), h("span", {}, [t("budget for weights")]), budget]);
        legend.append(budgetItem);
        const total = h("span", {className: "alv-size"});
        const title = heading("VRAM");
        title.append(total);
        const unknown = h("p", {className: "alv-quiet"}, [t("Not known yet.")]);
        const root = h("section", {className: "alv-section"}, [title, bar, legend, unknown]);

        function update(status) {
            const vram = ours.vramOf(status);
            for (const [element, shown] of [[bar, vram], [legend, vram], [unknown, !vram]]) ours.show(element, Boolean(shown));
            ours.setText(total, vram && vram.total ? ours.bytes(vram.total) : "");
            if (!vram) return;
            for (const part of vram.parts) {
                parts[part.id].style.width = `${(part.share * 100).toFixed(3)}%`;
                ours.setText(labels[part.id], part.label);
                ours.setText(sizes[part.id], part.bytes === null ? ours.UNKNOWN : ours.bytes(part.bytes));
            }
            ours.show(mark, vram.budgetShare !== null);
            ours.show(budgetItem, vram.budgetShare !== null);
            if (vram.budgetShare !== null) mark.style.insetInlineStart = `${(vram.budgetShare * 100).toFixed(3)}%`;
            ours.setText(budget, ours.bytes(vram.budget));
            const free = vram.parts.find((part) => part.id === "free");
            ours.setAttribute(bar, "aria-valuenow", Math.round((1 - free.share) * 100));
            ours.setAttribute(bar, "aria-valuetext", vram.sentence);
        }
        return {root, update};
    };

    /** This pass, the best schedule, the limit and stock, as bars of one scale. */
    ours.passSection = function() {
        const rows = {};
        const body = h("tbody", {});
        for (const {id, label} of ours.passBars({})) {
            const fill = h("span", {className: "alv-fill", "data-row": id});
            const time = h("td", {className: "alv-size"}), note = h("td", {className: "alv-quiet"});
            body.append(h("tr", {}, [h("th", {scope: "row"}, [label]),
                h("td", {className: "alv-track", "aria-hidden": "true"}, [fill]), time, note]));
            rows[id] = {fill, time, note};
        }
        const network = h("span", {className: "alv-size"});
        const title = heading(ours.t("Time per pass"));
        title.append(network);
        const root = h("section", {className: "alv-section"}, [title, h("table", {className: "alv-passes"}, [body])]);
        return {root, update(status) {
            ours.setText(network, typeof status.network === "string" ? status.network : "");
            for (const row of ours.passBars(status)) {
                rows[row.id].fill.style.width = `${(row.share * 100).toFixed(2)}%`;
                ours.setText(rows[row.id].time, row.seconds === null ? ours.UNKNOWN : ours.seconds(row.seconds));
                ours.setText(rows[row.id].note, row.note);
            }
        }};
    };

    /** The table of figures. Rows come and go with what the server knows (weights on disk); their order stays. */
    ours.factSection = function() {
        const list = h("dl", {className: "alv-facts"}), rows = new Map();
        const root = h("section", {className: "alv-section"}, [heading(ours.t("Figures")), list]);
        return {root, update(status) {
            const facts = ours.facts(status), shown = new Set(facts.map((fact) => fact.id));
            let before = null;
            for (const fact of facts) {
                if (!rows.has(fact.id)) {
                    const value = h("dd", {});
                    const row = h("div", {"data-fact": fact.id}, [h("dt", {}, [fact.label]), value]);
                    if (before) before.after(row);
                    else list.prepend(row);
                    rows.set(fact.id, {row, value});
                }
                const {row, value} = rows.get(fact.id);
                ours.setText(value, fact.text);
                before = row;
            }
            for (const [id, {row}] of rows) ours.show(row, shown.has(id));
        }};
    };

    /** What to change, one sentence each. */
    ours.adviceSection = function() {
        const list = h("ul", {className: "alv-advice"});
        const root = h("section", {className: "alv-section"}, [heading(ours.t("Advice")), list]);
        return {root, update(status) {
            const advices = ours.advices(status);
            ours.show(root, advices.length > 0);
            while (list.children.length > advices.length) list.lastElementChild.remove();
            advices.forEach((advice, index) => {
                if (!list.children[index]) list.append(h("li", {}));
                ours.setText(list.children[index], advice);
            });
        }};
    };

    /** What the console said, folded, newest first. */
    ours.messageSection = function() {
        const {t} = ours;
        const summary = h("summary", {}), list = h("ol", {className: "alv-messages"});
        const root = h("details", {className: "alv-section alv-folded"}, [summary, list]);
        let drawn = "";
        return {root, update(status) {
            const messages = ours.messagesOf(status), now = JSON.stringify(messages);
            ours.show(root, messages.length > 0);
            if (now === drawn) return; // a text that is being selected stays
            drawn = now;
            ours.setText(summary, t("Messages ({n})", {n: messages.length}));
            list.replaceChildren(...messages.map((one) => h("li", {"data-level": one.level}, [
                h("time", {}, [one.at === null ? ours.UNKNOWN : new Date(one.at * 1000).toLocaleTimeString()]),
                h("span", {className: "alv-level"}, [one.word]),
                h("span", {className: "alv-text"}, [one.text + (one.count > 1 ? ` (${t("{n} times", {n: one.count})})` : "")]),
            ])));
        }};
    };
})(window.asyncLowvram);
