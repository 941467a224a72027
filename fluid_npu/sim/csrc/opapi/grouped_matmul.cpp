// npu_grouped_matmul and npu_grouped_matmul_add_. M rows, K inner, N outer, E groups.
//
// group_type 0: rows are grouped, x [M, K] by weight [E, K, N] gives [M, N]. group_type 2: the inner dimension is
// grouped, x [K, M] by [M, N] (M grouped) gives [E, K, N]. -1: a list of plain matmuls.
#include "core.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>

using namespace fluidsim;

namespace {

constexpr char kSource[] = "op-plugin docs, torch_npu-npu_grouped_matmul";
constexpr char kAdd[] = "CANN docs, aclnnGroupedMatmulAdd";
constexpr int64_t kInnerLimit = 65536, kMaxGroups = 1024, kMaxTensors = 128;
constexpr int64_t kTotals = 0, kCounts = 1;  // group_list_type

struct Operands {
    std::vector<at::Tensor> x, weight, bias, out;
    at::Tensor group_list;
    int64_t group_type, list_type;

    bool one_weight() const { return weight.size() == 1 && weight[0].dim() == 3; }
    int64_t groups() const { return group_list.size(0); }
    at::Tensor weight_of(int64_t group) const { return one_weight() ? weight[0][group] : weight[group]; }
};

void check_tensor(const char* name, const at::Tensor& x) {
    require(is_half_or_float(x), std::string(name) + " is fp32, fp16 or bf16 (quantised kinds are not simulated)", show(x), kSource);
    require(x.size(-1) < kInnerLimit, std::string("the last dimension of ") + name + " is below 65536", show(x), kSource);
}

void check_types(const Operands& o) {
    require(o.x.size() <= kMaxTensors && o.weight.size() <= kMaxTensors, "x and weight are lists of at most 128",
            std::to_string(o.x.size()) + " and " + std::to_string(o.weight.size()), kSource);
    auto type = o.x[0].scalar_type();
    for (const auto& x : o.x) check_tensor("x", x);
    for (const auto& weight : o.weight) {
        check_tensor("weight", weight);
        require(weight.scalar_type() == type, "x and weight have one dtype", show(o.x[0]) + " and " + show(weight), kSource);
    }
    require(type != at::kFloat || (o.x.size() == 1 && o.weight.size() == 1), "fp32 wants a single x and weight",
            std::to_string(o.x.size()) + " and " + std::to_string(o.weight.size()), kSource);
    auto bias_type = type == at::kBFloat16 ? at::kFloat : type;
    for (const auto& bias : o.bias)
        if (bias.defined())
            require(bias.scalar_type() == bias_type, "the bias is fp16 for fp16, fp32 for bf16 and fp32", show(bias), kSource);
}

void check_group_list(const Operands& o) {
    const auto& list = o.group_list;
    require(list.scalar_type() == at::kLong && list.dim() == 1, "group_list is a 1-D int64 tensor", show(list), kSource);
    require(list.size(0) != 1, "the length of group_list is not 1", show(list), kSource);
    require(list.size(0) <= (o.one_weight() || o.group_type == 2 ? kMaxGroups : kMaxTensors),
            "there are at most 1024 groups with one 3-D weight, else 128", show(list), kSource);
    require(o.list_type == kTotals || o.list_type == kCounts, "group_list_type is 0 or 1 (2 is for int8)",
            std::to_string(o.list_type), kSource);
    const auto &x = o.x[0], &weight = o.weight[0];
    require(x.dim() == 2 && x.size(1) == weight.size(-2), "the last dimension of x is weight's next to last",
            show(x) + " and " + show(weight), kSource);
    if (o.group_type != 0) return;
    int64_t weights = o.one_weight() ? o.weight[0].size(0) : static_cast<int64_t>(o.weight.size());
    require(weights == list.size(0), "there is a weight for each group", show(list) + " for " + std::to_string(weights), kSource);
}

// The rows of each group. Values are on the device: what is wrong with them shows when the kernel runs.
std::vector<int64_t> counts_of(const char* source, const at::Tensor& list, int64_t list_type, int64_t rows) {
    std::vector<int64_t> counts;
    int64_t before = 0;
    auto values = list.contiguous();
    at::IntArrayRef given(values.const_data_ptr<int64_t>(), list.size(0));
    for (int64_t value : given) {
        counts.push_back(list_type == kTotals ? value - before : value);
        before = list_type == kTotals ? value : before + value;
        require(counts.back() >= 0, list_type == kTotals ? "group_list does not decrease" : "group_list is not negative",
                show(given), source);
    }
    require(before == rows, list_type == kTotals ? "group_list ends at the number of rows" : "group_list sums to the rows",
            show(given) + " for " + std::to_string(rows) + " rows", source);
    return counts;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) { return at::mm(wide(a), wide(b)); }

void by_rows(const Operands& o) {
    int64_t start = 0, group = 0;
    for (int64_t count : counts_of(kSource, o.group_list, o.list_type, o.x[0].size(0))) {
        auto y = product(o.x[0].narrow(0, start, count), o.weight_of(group));
        if (!o.bias.empty() && o.bias[0].defined())
            y = y + wide(o.bias.size() == 1 ? o.bias[0].select(0, group) : o.bias[group]);
        (o.out.size() == 1 ? o.out[0].narrow(0, start, count) : o.out[group]).copy_(y);
        start += count;
        ++group;
    }
}

void by_inner(const Operands& o) {
    int64_t start = 0, group = 0;
    for (int64_t count : counts_of(kSource, o.group_list, o.list_type, o.x[0].size(1))) {
        o.out[0].select(0, group++).copy_(product(o.x[0].narrow(1, start, count), o.weight[0].narrow(0, start, count)));
        start += count;
    }
}

Kernel grouped_matmul(Operands o) {
    check_types(o);
    require(o.group_type == -1 || o.group_type == 0 || o.group_type == 2, "group_type is -1, 0 or 2",
            std::to_string(o.group_type), kSource);
    if (o.group_list.defined()) check_group_list(o);
    if (!o.group_list.defined() || o.group_type == -1) {
        require(o.x.size() == o.weight.size(), "without a group list there is a weight for each x",
                std::to_string(o.x.size()) + " and " + std::to_string(o.weight.size()), kSource);
        return [o] {
            for (size_t i = 0; i < o.x.size(); ++i) o.out[i].copy_(at::matmul(wide(o.x[i]), wide(o.weight[i])));
        };
    }
    require(o.x.size() == 1, "several x with a group list are not simulated", std::to_string(o.x.size()), "fluid-sim");
    return o.group_type == 0 ? Kernel([o] { by_rows(o); }) : Kernel([o] { by_inner(o); });
}

void refuse_quantised(std::initializer_list<const aclTensorList*> lists, int64_t activation) {
    for (const aclTensorList* list : lists)
        require(tensors(list).empty(), "quantisation is not simulated", "a scale or offset", "fluid-sim");
    require(activation == 0, "an activation is not simulated", std::to_string(activation), "fluid-sim");
}

}  // namespace

#define TENSOR_LIST_PARAMETERS                                                                                          \
    const aclTensorList *x, const aclTensorList *weight, const aclTensorList *bias, const aclTensorList *scale,         \
        const aclTensorList *offset, const aclTensorList *antiquant_scale, const aclTensorList *antiquant_offset,       \
        const aclTensorList *per_token_scale, const aclTensor *group_list, const aclTensorList *activation_input,       \
        const aclTensorList *activation_scale, const aclTensorList *activation_offset, int64_t split_item,              \
        int64_t group_type, int64_t group_list_type, int64_t activation

ACLNN(GroupedMatmulV5,
      (TENSOR_LIST_PARAMETERS, const aclIntArray* tuning, const aclTensorList* out, const aclTensorList* activation_out,
       const aclTensorList* scale_out),
      (x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale, group_list, activation_input,
       activation_scale, activation_offset, split_item, group_type, group_list_type, activation, tuning, out,
       activation_out, scale_out)) {
    refuse_quantised({scale, offset, antiquant_scale, antiquant_offset, per_token_scale, activation_input,
                      activation_scale, activation_offset}, activation);
    return grouped_matmul({tensors(x), tensors(weight), tensors(bias), tensors(out), tensor(group_list), group_type, group_list_type});
}

// op-plugin asks for this one before it accepts a group_list tensor; it calls V5 where that exists.
ACLNN(GroupedMatmulV4,
      (TENSOR_LIST_PARAMETERS, const aclTensorList* out, const aclTensorList* activation_out, const aclTensorList* scale_out),
      (x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale, group_list, activation_input,
       activation_scale, activation_offset, split_item, group_type, group_list_type, activation, out, activation_out,
       scale_out)) {
    refuse_quantised({scale, offset, antiquant_scale, antiquant_offset, per_token_scale, activation_input,
                      activation_scale, activation_offset}, activation);
    return grouped_matmul({tensors(x), tensors(weight), tensors(bias), tensors(out), tensor(group_list), group_type, group_list_type});
}

// The overload with a list of integers: running totals that increase strictly.
ACLNN(GroupedMatmul,
      (const aclTensorList* x, const aclTensorList* weight, const aclTensorList* bias, const aclTensorList* scale,
       const aclTensorList* offset, const aclTensorList* antiquant_scale, const aclTensorList* antiquant_offset,
       const aclIntArray* group_list, int64_t split_item, const aclTensorList* out),
      (x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, group_list, split_item, out)) {
    refuse_quantised({scale, offset, antiquant_scale, antiquant_offset}, 0);
    Operands o{tensors(x), tensors(weight), tensors(bias), tensors(out), at::Tensor(), 0, kTotals};
    auto ends = group_list->values;
    if (ends.empty()) return grouped_matmul(o);
    for (size_t i = 1; i < ends.size(); ++i)
        require(ends[i] > ends[i - 1], "a list of groups increases strictly", show(ends), kSource);
    o.group_list = at::tensor(ends, at::kLong);
    return grouped_matmul(o);
}

// y += x^T weight for each group; the group list is always read as running totals.
ACLNN(GroupedMatmulAdd,
      (const aclTensor* x, const aclTensor* weight, const aclTensor* group_list, const aclTensor* y, bool transpose_x,
       bool transpose_weight, int64_t group_type),
      (x, weight, group_list, y, transpose_x, transpose_weight, group_type)) {
    auto a = tensor(x), b = tensor(weight), list = tensor(group_list), sum = tensor(y);
    require(is_half(a) && a.scalar_type() == b.scalar_type(), "x and weight are both fp16 or both bf16",
            show(a) + " and " + show(b), kAdd);
    require(sum.scalar_type() == at::kFloat && (sum.dim() == 2 || sum.dim() == 3), "self is fp32 with 2 or 3 dimensions",
            show(sum), kAdd);
    require(transpose_x && !transpose_weight && group_type == 2,
            "transpose_x=True, transpose_weight=False and group_type=2 are the only ones allowed",
            std::to_string(transpose_x) + ", " + std::to_string(transpose_weight) + ", " + std::to_string(group_type), kAdd);
    require(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0), "x is [M, K] and weight [M, N]", show(a) + " and " + show(b), kAdd);
    require(a.numel() > 0 && b.numel() > 0 && sum.numel() > 0, "no tensor is empty", show(a) + " and " + show(b), kAdd);
    require(list.scalar_type() == at::kLong && list.dim() == 1, "group_list is a 1-D int64 tensor", show(list), kAdd);
    require(sum.numel() == list.size(0) * a.size(1) * b.size(1), "self has E * K * N elements", show(sum), kAdd);
    require(sum.is_contiguous(), "self is contiguous", show(sum) + " with strides " + show(sum.strides()), kAdd);
    return [a, b, list, sum] {
        auto groups = sum.view({list.size(0), a.size(1), b.size(1)});
        int64_t start = 0, group = 0;
        for (int64_t count : counts_of(kAdd, list, kTotals, a.size(0))) {
            groups[group++].add_(product(a.narrow(0, start, count).t(), b.narrow(0, start, count)));
            start += count;
        }
    };
}
