// libascendcl.so, the rest: functions that torch_npu links against and that no test may reach. This file does not
// include CANN's headers, so a refusal needs no prototype.

#include <cstdint>
#include <string>

#include "standin.h"

#define REFUSE(function) \
  void function() { standin::refuse(#function " is not part of the stand-in"); }

// The legacy road describes an operator before it runs it. The descriptions are accepted so that the refusal can
// name the operator.
#define IGNORE(function) \
  int function() { return 0; }

namespace {

int placeholder;

[[noreturn]] void refuse_legacy(const char* operation) {
  standin::refuse(std::string("the legacy operator ") + operation +
                  " was asked for: the aclnn operator that torch_npu looked for first is missing (operators_*.cpp)");
}

}  // namespace

extern "C" {

void aclopCompileAndExecute(const char* operation) { refuse_legacy(operation); }
void aclopCompileAndExecuteV2(const char* operation) { refuse_legacy(operation); }

void* aclopCreateAttr() { return &placeholder; }
void* aclCreateDataBuffer() { return &placeholder; }
void* aclCreateTensorDesc() { return &placeholder; }
IGNORE(aclopDestroyAttr)
IGNORE(aclopSetAttrBool)
IGNORE(aclopSetAttrDataType)
IGNORE(aclopSetAttrFloat)
IGNORE(aclopSetAttrInt)
IGNORE(aclopSetAttrListBool)
IGNORE(aclopSetAttrListFloat)
IGNORE(aclopSetAttrListInt)
IGNORE(aclopSetAttrListListInt)
IGNORE(aclopSetAttrString)
IGNORE(aclDestroyDataBuffer)
IGNORE(aclDestroyTensorDesc)
IGNORE(aclSetTensorDescName)
IGNORE(aclSetTensorFormat)
IGNORE(aclSetTensorPlaceMent)
IGNORE(aclSetTensorShape)

REFUSE(aclGetTensorDescDimV2)
REFUSE(aclGetTensorDescFormat)
REFUSE(aclGetTensorDescNumDims)
REFUSE(aclGetTensorDescType)
REFUSE(aclmdlFinalizeDump)
REFUSE(aclmdlInitDump)
REFUSE(aclmdlSetDump)
REFUSE(aclrtBinaryGetFunction)
REFUSE(aclrtBinaryLoadFromData)
REFUSE(aclrtGetFunctionAddr)
REFUSE(aclrtMemExportToShareableHandle)
REFUSE(aclrtMemImportFromShareableHandle)
REFUSE(aclrtMemSetPidToShareableHandle)
REFUSE(rtDevBinaryRegister)
REFUSE(rtFunctionRegister)
REFUSE(rtGetC2cCtrlAddr)
REFUSE(rtKernelLaunch)

// The profiler's entry points: nobody listens.
uint64_t MsprofGetHashId() { return 0; }
uint64_t MsprofSysCycleTime() { return 0; }
IGNORE(MsprofRegisterCallback)
IGNORE(MsprofReportAdditionalInfo)
IGNORE(MsprofReportApi)
IGNORE(MsprofReportCompactInfo)

}  // extern "C"
